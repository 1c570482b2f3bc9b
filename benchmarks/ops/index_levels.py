"""Selection in one level and in two, at every level of instructions that this CPU has.

    python -m benchmarks.ops.index_levels --out out/index_levels.json
    python -m benchmarks.ops.index_levels --before other/checkout/src/fulmen/ops/cpp --levels avx512,avx2

One thread, CPU time. Everything alternates in one process, libraries of an older build (`--before`) too,
which are opened beside the new ones. What is printed are medians, and medians of ratios within a round.
"""

import ctypes
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.machine import describe_machine
from benchmarks.ops.cpu_ops import causal, normal
from fulmen.files import atomic_write
from fulmen.ops.common.index_keys import pack_index_keys
from fulmen.ops.cpp import library
from fulmen.ops.cpp.abi import CPP_LEVELS
from fulmen.ops.topk import index_topk
from fulmen.ops.two_level import two_level_topk

# SmolLM2-135M: index heads, index key heads and their width; coarse heads and theirs.
HEADS, KEY_HEADS, WIDTH, COARSE_HEADS, COARSE_WIDTH = 9, 3, 48, 10, 24
# Keys, queries, k.
CASES = {"one query": (131072, 1, 512), "512 queries": (32768, 512, 256)}
Calls = dict[str, Callable[[], Any]]


def main(
    out: Annotated[Path, typer.Option(help="JSON file.")] = Path("out/index_levels.json"),
    levels: Annotated[str, typer.Option(help="Of " + ", ".join(CPP_LEVELS) + ".")] = ",".join(CPP_LEVELS),
    before: Annotated[Path | None, typer.Option(help="Folder of an older build's libraries.")] = None,
    rounds: int = 9,
) -> None:
    """Time, print a table and write everything to a JSON file."""
    torch.set_num_threads(1)
    libraries = opened(levels.split(","), before)
    results = []
    for name, (keys, queries, topk) in CASES.items():
        calls = calls_of(keys, queries, topk)
        taken = alternate(libraries, calls, rounds if queries == 1 else max(rounds // 3, 1))
        for level in libraries:
            results.append({"case": name, "library": level, **figures(level, calls, taken)})
            print(json.dumps(results[-1]), flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    everything = {**describe_machine(), "results": results}
    atomic_write(out, lambda temporary: temporary.write_text(json.dumps(everything, indent=1)))


def opened(levels: list[str], before: Path | None) -> dict[str, ctypes.CDLL]:
    """Libraries that this CPU can run, by level; those of the older build as "LEVEL before"."""
    found: dict[str, ctypes.CDLL] = {}
    for level in levels:
        one, reason = library._open_level(level)
        if one is None:
            print(f"{level}: {reason}")
            continue
        found[level] = one
        if before is not None:
            found[f"{level} before"] = ctypes.CDLL(str((before / f"{CPP_LEVELS[level]}.so").resolve()))
    return found


@contextmanager
def by_library(one: ctypes.CDLL) -> Iterator[None]:
    """The operations call this one."""
    kept = library._open_library
    library._open_library = lambda: (one, None)  # type: ignore[assignment]
    try:
        yield
    finally:
        library._open_library = kept


def calls_of(keys: int, queries: int, topk: int) -> Calls:
    """Neighbouring queries are alike, as a model's are, and so are their candidates."""
    shapes = ((HEADS, WIDTH), (COARSE_HEADS, COARSE_WIDTH))
    like = [normal(1, 1, *shape) + 0.3 * normal(1, queries, *shape, seed=1) for shape in shapes]
    packed = pack_index_keys(normal(1, keys, KEY_HEADS, WIDTH, seed=2))
    coarse_k = pack_index_keys(normal(1, keys, COARSE_WIDTH, seed=3))
    w, b, coarse_b = (normal(1, queries, n, seed=4) for n in (HEADS, HEADS, COARSE_HEADS))
    index = (like[0], packed, w.abs(), b - 1, *causal(queries, keys))
    coarse = (like[1], coarse_k, coarse_b - 1)
    limits = {"topk": topk, "n_candidates": 8 * topk, "all_up_to": 32 * topk}
    return {
        "one level": lambda: index_topk(*index, topk),
        "two levels": lambda: two_level_topk(*coarse, *index, **limits),
    }


def alternate(libraries: dict[str, ctypes.CDLL], calls: Calls, rounds: int) -> dict[str, list[float]]:
    """CPU seconds of every call by every library, round by round, after one that does not count."""
    taken: dict[str, list[float]] = {f"{level} {name}": [] for level in libraries for name in calls}
    for _ in range(rounds + 1):
        for level, one in libraries.items():
            with by_library(one):
                for name, call in calls.items():
                    clock = time.thread_time()
                    call()
                    taken[f"{level} {name}"].append(time.thread_time() - clock)
    return {name: seconds[1:] for name, seconds in taken.items()}


def figures(level: str, calls: Calls, taken: dict[str, list[float]]) -> dict[str, float]:
    """Milliseconds of each call, and how many times as fast two levels are, and as the older build."""
    seconds = {name: taken[f"{level} {name}"] for name in calls}
    found = {f"{name}, ms": round(1e3 * statistics.median(many), 2) for name, many in seconds.items()}
    one, two = seconds.values()
    found["one / two"] = ratio(one, two)
    for name, many in seconds.items():
        if old := taken.get(f"{level} before {name}"):
            found[f"before / now, {name}"] = ratio(old, many)
    return found


def ratio(above: list[float], below: list[float]) -> float:
    """Median of ratios within a round."""
    return round(statistics.median(x / y for x, y in zip(above, below, strict=True)), 2)


if __name__ == "__main__":
    typer.run(main)
