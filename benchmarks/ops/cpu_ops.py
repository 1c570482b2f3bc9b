"""The C++ kernels on this CPU: checked against the specification, then timed against dense attention.

    python -m benchmarks.ops.cpu_ops --out out/cpu_ops.json

One thread; times are CPU time, which other work on the machine disturbs less than the clock. A kernel whose
check fails is not timed, nor is anything that calls it. All calls of a comparison alternate in one run, a
plain read of memory among them: it gives the bandwidth of that moment, and so the floor. The operations are
called as a model calls them, input checks included, with memory in pages of 2 MiB, as `fulmen serve` has it.
A token is timed in the second of two layers, as most of a model's are: its keys are in no cache, the code is.
Dense peers are torch's SDPA for prompts; for one token, where SDPA crawls, the C++ dense attention over
keys and values as a cache keeps them and head by head.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.machine import describe_machine
from benchmarks.memory.training import estimate_gib, measure
from benchmarks.ops.gpu_inputs import differs
from benchmarks.ops.gpu_ops import library_version
from fulmen.files import atomic_write
from fulmen.ops.attention.dense import dense_attention
from fulmen.ops.attention.dense.reference import dense_attention_reference
from fulmen.ops.attention.sparse import sparse_attention
from fulmen.ops.attention.sparse.reference import sparse_attention_reference
from fulmen.ops.common.index_keys import pack_index_keys, unpack_index_keys
from fulmen.ops.cpp.library import cpp_reason, has_tiles
from fulmen.ops.dispatch import pin_backend
from fulmen.ops.scores import index_scores
from fulmen.ops.scores.reference import index_scores_reference
from fulmen.ops.topk import index_topk, select_topk
from fulmen.serving.engine.settings import LARGE_PAGES

READ_BYTES = 2**28
# Read before each call: more than the last level of cache holds, which some servers' is 480 MiB of.
FLUSH_BYTES = 2**30
DTYPE = torch.bfloat16


class Shape(NamedTuple):
    """Heads H over G key heads of width D; index heads J over I, width E, as `default_dsa` gives them."""

    heads: tuple[int, int, int]
    index_heads: tuple[int, int, int]
    topk: int


SHAPES = {
    "SmolLM2-135M": Shape((9, 3, 64), (9, 3, 48), 512),
    "Qwen3-8B": Shape((32, 8, 128), (32, 8, 96), 2048),
}


Calls = dict[str, Callable[[], Any]]


class Case(NamedTuple):
    """What is compared: "dsa" with the other calls; bytes that it must read at least, or 0."""

    name: str
    needs: tuple[str, ...]
    make_layer: Callable[[], Calls]
    rounds: int
    layers: int = 1  # of which the last is timed
    bytes: int = 0
    dense_bytes: int = 0


def main(
    out: Annotated[Path, typer.Option(help="JSON file.")] = Path("out/cpu_ops.json"),
    shapes: Annotated[str, typer.Option(help="Of " + ", ".join(SHAPES) + ".")] = ",".join(SHAPES),
    decode: Annotated[str, typer.Option(help="Keys before the token.")] = "8192,32768,131072",
    prefill: Annotated[str, typer.Option(help="Tokens of the prompts.")] = "2048,8192,32768",
    loss: Annotated[int, typer.Option(help="Tokens of the warm-up loss; 0 leaves it out.")] = 8192,
    rounds: Annotated[int, typer.Option(help="Times that every side of a decode case is run.")] = 9,
) -> None:
    """Check, time, print a table and write everything to a JSON file."""
    if reason := cpp_reason():
        print(f"cpu_ops.py needs the C++ kernels: {reason}")
        raise typer.Exit(1)
    with_large_pages()
    torch.set_num_threads(1)
    print(json.dumps(machine(), indent=1))
    failures = {name: check() for name, check in CHECKS.items()}
    for name, failure in failures.items():
        print(f"check {name}: {failure or 'ok'}")
    results = []
    for case in all_cases(shapes, decode, prefill, rounds):
        broken = [name for name in case.needs if failures[name]]
        results.append({"case": case.name, "failed": broken} if broken else timed(case))
        print(row(results[-1]), flush=True)
    losses = warmup_losses(loss) if loss else []
    out.parent.mkdir(parents=True, exist_ok=True)
    everything = {**machine(), "failures": failures, "results": results, "losses": losses}
    atomic_write(out, lambda temporary: temporary.write_text(json.dumps(everything, indent=1)))
    raise typer.Exit(any(failures.values()))


def with_large_pages() -> None:
    """Start again with glibc's setting for them, which counts from a process's start on."""
    if LARGE_PAGES.keys() - os.environ.keys():
        os.environ.update(LARGE_PAGES)
        os.execv(sys.executable, [sys.executable, *sys.argv])


# ---- inputs


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = DTYPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def causal(queries: int, keys: int) -> tuple[Tensor, Tensor]:
    stop = torch.arange(keys - queries + 1, keys + 1)[None]
    return torch.zeros_like(stop), stop


def index_inputs(shape: Shape, queries: int, keys: int) -> tuple[Tensor, ...]:
    """q, packed keys, w and b; neighbouring queries are alike, as a model's are."""
    J, index_keys, E = shape.index_heads
    q_BTJE = normal(1, 1, J, E) + 0.3 * normal(1, queries, J, E, seed=1)
    packed_BSIX = pack_index_keys(normal(1, keys, index_keys, E, seed=2))
    return q_BTJE.float(), packed_BSIX, normal(1, queries, J, seed=3).abs(), normal(1, queries, J, seed=4)


def attention_inputs(shape: Shape, queries: int, keys: int, dtype: torch.dtype = DTYPE) -> tuple[Tensor, ...]:
    H, G, D = shape.heads
    shapes = [(1, queries, H, D), (1, keys, G, D), (1, keys, G, D)]
    return tuple(normal(*s, seed=i, dtype=dtype) for i, s in enumerate(shapes))


# ---- checks: None, or how a kernel differs from the specification


def check_scores() -> str | None:
    for shape in SHAPES.values():
        q, packed, w, b = index_inputs(shape, 20, 700)
        found = index_scores(q, packed, w, b, *causal(20, 700))
        wanted = index_scores_reference(q, unpack_index_keys(packed), w, b, *causal(20, 700)).scores_BTS
        if failure := differs(found, wanted, 2e-5):
            return failure
    return None


def check_selection() -> str | None:
    """Exact at length, with ties, against the torch backend; a query alone against all together."""
    interval = causal(16, 20_000)
    noise = normal(1, 16, 20_000, dtype=torch.float32)
    for scores in (noise, noise.round(), noise.relu()):
        chosen = select_topk(scores, *interval, 2048)
        with pin_backend("torch"):
            if not torch.equal(chosen, select_topk(scores, *interval, 2048)):
                return "selects other keys than the torch backend"
    for shape in SHAPES.values():
        q, packed, w, b = index_inputs(shape, 16, 20_000)
        together = index_topk(q, packed, w, b, *interval, shape.topk)
        last = (slice(None), slice(15, 16))
        alone = index_topk(q[last], packed, w[last], b[last], *(x[last] for x in interval), shape.topk)
        if not torch.equal(alone, together[last]):
            return "a query alone selects other keys than among others"
    return None


def check_attention(queries: int) -> str | None:
    for shape in SHAPES.values():
        qkv = attention_inputs(shape, queries, 900)
        topk = index_topk(*index_inputs(shape, queries, 900), *causal(queries, 900), 200)
        sparse = sparse_attention_reference(*qkv, topk, 0.1)
        dense = dense_attention_reference(*qkv, *causal(queries, 900), 0.1)
        for found, wanted in (
            (sparse_attention(*qkv, topk, 0.1), sparse),
            (dense_attention(*qkv, *causal(queries, 900), 0.1), dense),
        ):
            failure = differs(found[0], wanted.out_BTHV, 2e-2) or differs(found[1], wanted.lse_BTH, 1e-4)
            if failure:
                return failure
    return None


CHECKS: dict[str, Callable[[], str | None]] = {
    "scores": check_scores,
    "selection": check_selection,
    "decode attention": partial(check_attention, 1),
    "attention": partial(check_attention, 33),
}


# ---- cases


def all_cases(shapes: str, decode: str, prefill: str, rounds: int) -> Iterator[Case]:
    for name in shapes.split(","):
        for keys in map(int, filter(None, decode.split(","))):
            yield decode_case(name, keys, rounds)
        for tokens in map(int, filter(None, prefill.split(","))):
            # Dense attention of 32 K tokens takes a minute.
            few = 1 if tokens > 8192 else 3
            needs = ("scores", "selection", "attention")
            yield Case(
                f"{name}: prefill of {tokens}", needs, partial(prefill_calls, SHAPES[name], tokens), few
            )


def decode_case(name: str, keys: int, rounds: int) -> Case:
    """One token after `keys` - 1, one layer."""
    shape = SHAPES[name]
    (_, G, D), (_, index_keys, E) = shape.heads, shape.index_heads
    pair = 2 * G * D * DTYPE.itemsize
    floor = keys * index_keys * (E + 2) + min(shape.topk, keys) * pair
    needs = ("scores", "selection", "decode attention")
    calls = partial(decode_calls, shape, keys)
    name = f"{name}: decode at {keys}"
    return Case(name, needs, calls, rounds, layers=2, bytes=floor, dense_bytes=keys * pair)


def decode_calls(shape: Shape, keys: int) -> Calls:
    index, qkv, interval = index_inputs(shape, 1, keys), attention_inputs(shape, 1, keys), causal(1, keys)
    scale = shape.heads[2] ** -0.5
    fixed = index_topk(*index, *interval, shape.topk)
    by_head = [qkv[0], *(x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv[1:])]
    return {
        "dsa": lambda: sparse_attention(*qkv, index_topk(*index, *interval, shape.topk), scale),
        "selection alone": lambda: index_topk(*index, *interval, shape.topk),
        "sparse attention alone": lambda: sparse_attention(*qkv, fixed, scale),
        "dense": lambda: dense_attention(*qkv, *interval, scale),
        "dense, head by head": lambda: dense_attention(*by_head, *interval, scale),
    }


def prefill_calls(shape: Shape, tokens: int) -> Calls:
    index, qkv, interval = (
        index_inputs(shape, tokens, tokens),
        attention_inputs(shape, tokens, tokens),
        causal(tokens, tokens),
    )
    scale = shape.heads[2] ** -0.5
    fixed = index_topk(*index, *interval, shape.topk)

    def sdpa(dtype: torch.dtype) -> Callable[[], Any]:
        heads = [x.to(dtype).transpose(1, 2) for x in qkv]
        return lambda: scaled_dot_product_attention(*heads, is_causal=True, scale=scale, enable_gqa=True)

    return {
        "dsa": lambda: sparse_attention(*qkv, index_topk(*index, *interval, shape.topk), scale),
        "selection alone": lambda: index_topk(*index, *interval, shape.topk),
        "sparse attention alone": lambda: sparse_attention(*qkv, fixed, scale),
        "dense, SDPA bfloat16": sdpa(DTYPE),
        "dense, SDPA float32": sdpa(torch.float32),
    }


def warmup_losses(length: int) -> list[dict[str, Any]]:
    """The warm-up loss of one layer, forward and backward: ours and the eager one.

    The eager one at a quarter of the length alone, where it fits: its memory grows with the square.
    """
    results: list[dict[str, Any]] = []
    for tokens in (length // 4, length):
        for ours in (True, False):
            if not ours and tokens == length:
                found: dict[str, float] = {"estimated gib": estimate_gib("warmup_loss_all_rows", tokens)}
            else:
                found = measure("warmup_loss_all_rows", tokens, ours)
            results.append({"tokens": tokens, "ours": ours, **found})
            print(f"| warm-up loss, {tokens} tokens | {'ours' if ours else 'eager'} | {found} |", flush=True)
    return results


# ---- timing


def alternate(layers: list[Calls], rounds: int) -> dict[str, list[float]]:
    """Seconds of CPU time of every call's last layer in every round; one round before is thrown away.

    Before each, other memory is read, so that every call finds the caches as other layers leave them.
    """
    memory, others = torch.ones(READ_BYTES // 4), torch.ones(FLUSH_BYTES // 4)
    *before, last = layers
    last = {"read": memory.sum, **last}
    times: dict[str, list[float]] = {name: [] for name in last}
    for done in range(rounds + 1):
        for name in times:
            others.sum()
            for calls in before:
                if name in calls:
                    calls[name]()
            begun = time.process_time()
            last[name]()
            if done or rounds == 1:
                times[name].append(time.process_time() - begun)
    return times


def timed(case: Case) -> dict[str, Any]:
    times = alternate([case.make_layer() for _ in range(case.layers)], case.rounds)
    medians = {name: statistics.median(seconds) * 1e3 for name, seconds in times.items()}
    result: dict[str, Any] = {"case": case.name, "seconds": times, "median ms": medians}
    result["times faster"] = {
        name: statistics.median(a / b for a, b in zip(seconds, times["dsa"], strict=True))
        for name, seconds in times.items()
        if name.startswith("dense")
    }
    if case.bytes:
        rates = [READ_BYTES / seconds for seconds in times["read"]]
        result["bandwidth GB/s"] = statistics.median(rates) / 1e9
        result["over the floor"] = statistics.median(
            seconds * rate / case.bytes for seconds, rate in zip(times["dsa"], rates, strict=True)
        )
        best = min((name for name in times if name.startswith("dense")), key=lambda name: medians[name])
        result["best dense's share of bandwidth"] = statistics.median(
            case.dense_bytes / (seconds * rate) for seconds, rate in zip(times[best], rates, strict=True)
        )
    return result


def row(result: dict[str, Any]) -> str:
    if "failed" in result:
        return f"| {result['case']} | not timed: {', '.join(result['failed'])} failed |"
    cells = [f"{name} {ms:.3g} ms" for name, ms in result["median ms"].items()]
    cells += [f"{ratio:.2f} times faster than {name}" for name, ratio in result["times faster"].items()]
    for key in ("bandwidth GB/s", "over the floor", "best dense's share of bandwidth"):
        cells += [f"{result[key]:.2f} {key}"] if key in result else []
    return f"| {result['case']} | {' | '.join(cells)} |"


def machine() -> dict[str, Any]:
    return {
        **describe_machine(),
        "matrix tiles": has_tiles(),
        "versions": {name: library_version(name) for name in ("torch", "fulmen")},
    }


if __name__ == "__main__":
    typer.run(main)
