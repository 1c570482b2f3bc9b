"""All that is to be measured on a GPU, in eight minutes: `benchmarks/gpu.sh`. Not run on a GPU yet.

Part by part, each kept in a file of its own, so that a run that ended early goes on where it stopped. A part
that fails is noted with its reason, and tried again by the next run. With `--device cpu` everything runs as
Triton interprets it (TRITON_INTERPRET=1), on shapes that this takes a minute for: to try the program.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton

from benchmarks.gpu import checks, speed
from benchmarks.gpu.shapes import MODELS, ModelShape
from benchmarks.machine import describe_machine
from fulmen.files import atomic_write
from fulmen.ops.triton_support import triton_reason

# 4/2 heads of 16, index heads 2/1 of 8, k = 16
TINY = ModelShape(4, 2, 16, 2, 1, 8, 16)
# 3 coarse heads of 6, which leave 4 keys of more than 16, of which 2 are kept
TINY_TWO_LEVEL = TINY._replace(topk=2, coarse_heads=3, coarse_width=6, candidate_factor=2)
TINY_MODEL = {
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 96},
    **{"num_attention_heads": 4, "num_key_value_heads": 2},
}
Part = Callable[[], Any]


def main() -> None:
    """Run what is not there yet, print it, write OUT/gpu.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="folder of the results")
    parser.add_argument("--minutes", type=float, default=7.5, help="start no part after so many")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: tiny shapes, interpreted"
    )
    given = parser.parse_args()
    if reason := triton_reason(given.device):
        parser.exit(1, f"benchmarks.gpu.run needs a GPU: {reason}\n")
    failed = run_parts(all_parts(given.device), given.out, 60 * given.minutes)
    parser.exit(int(failed))


def run_parts(parts: dict[str, Part], out: Path, seconds: float) -> bool:
    """Run those without a result until the time is up; whether a check found something wrong."""
    begin, results = time.monotonic(), {}
    for name, part in parts.items():
        kept = out / "parts" / f"{name.replace(' ', '-').replace('/', '-')}.json"
        if kept.exists():
            results[name] = json.loads(kept.read_text())
        elif time.monotonic() - begin > seconds:
            print(f"{name}: no time left; run this again", flush=True)
            continue
        else:
            results[name] = _result_of(part)
            if not went_wrong(results[name]):
                _write_json(kept, results[name])
        print(f"{name}: {json.dumps(results[name])}", flush=True)
    missing = [name for name in parts if name not in results]
    _write_json(out / "gpu.json", {"machine": machine(), "results": results, "missing": missing})
    return any(map(went_wrong, results.values()))


def went_wrong(result: dict[str, Any]) -> bool:
    """Whether a check failed, or a part could not run."""
    return bool(result.get("failure") or result.get("error"))


def all_parts(device: str) -> dict[str, Part]:
    """Checks, then what is timed: the figures that matter most first."""
    if device == "cpu":
        return {**check_parts({"tiny": TINY, "tiny two-level": TINY_TWO_LEVEL}, device, 40), **tiny_parts()}
    shapes = {name: MODELS[name] for name in ("smollm2", "qwen3-8b", "smollm2-two-level")}
    # With so few keys kept, two levels choose candidates at this length.
    shapes["qwen3-8b-two-level"] = MODELS["qwen3-8b-two-level"]._replace(topk=512)
    parts = check_parts(shapes, device, 20_000)
    for length in (131072, 32768, 8192, 4096):
        for batch in (1, 8, 64):
            # Keys and values twice, for dense beside the paged ones.
            if 2 * batch * length * 8 * 2 * 128 * 2 < 60e9:
                for model in ("qwen3-8b", "qwen3-8b-two-level"):
                    work = partial(speed.decode, MODELS[model], device, batch, length)
                    parts[f"decode {model}, batch {batch}, {length} tokens"] = work
    for length in (65536, 131072):
        for model in ("qwen3-8b", "qwen3-8b-two-level"):
            work = partial(speed.prefill, MODELS[model], device, length)
            parts[f"prefill {model}, {length} tokens"] = work
    for length in (8192, 32768):
        work = partial(speed.training, MODELS["qwen3-8b"], device, length)
        parts[f"training step qwen3-8b, {length} tokens"] = work
    parts["generate smollm2, 4096 tokens"] = partial(speed.generate, device, 4096, 64, {})
    return parts


def check_parts(shapes: dict[str, ModelShape], device: str, length: int) -> dict[str, Part]:
    """Of each shape: storing, selection, attention of decoding, drafts and prompts, and a CUDA graph."""
    parts: dict[str, Part] = {}
    for name, shape in shapes.items():
        given: dict[str, tuple[Any, ...]] = {
            "store": (checks.check_store, shape, device),
            "selection": (checks.check_selection, shape, device, length),
            **{
                f"attention of {queries} queries": (checks.check_attention, shape, device, queries, length)
                for queries in ((1, 9) if device == "cpu" else (1, 3, 200))
            },
        }
        if device != "cpu":
            given["graph"] = (checks.check_graph, shape, device, length)
        for what, call in given.items():
            parts[f"check {name}, {what}"] = partial(_checked, *call)
    return parts


def tiny_parts() -> dict[str, Part]:
    """What is timed on a GPU, in little: times mean nothing."""
    return {
        "decode tiny": partial(speed.decode, TINY, "cpu", 2, 40),
        "decode tiny two-level": partial(speed.decode, TINY_TWO_LEVEL, "cpu", 2, 40),
        "prefill tiny": partial(speed.prefill, TINY, "cpu", 24, 12),
        "prefill tiny two-level": partial(speed.prefill, TINY_TWO_LEVEL, "cpu", 24, 12),
        "training step tiny": partial(speed.training, TINY, "cpu", 8),
        "generate tiny": partial(speed.generate, "cpu", 8, 2, TINY_MODEL),
    }


def machine() -> dict[str, Any]:
    """The GPU, and versions of what computes on it."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    return {**describe_machine(), "gpu": gpu, "versions": versions}


def _checked(check: Callable[..., str | None], *arguments: Any) -> dict[str, Any]:
    return {"failure": checks.failure_of(check, *arguments)}


def _result_of(part: Part) -> dict[str, Any]:
    try:
        return part()
    except Exception as error:  # no memory, or a kernel that does not compile, must not end the run
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(value, indent=1)
    atomic_write(path, lambda temporary: temporary.write_text(text))


if __name__ == "__main__":
    main()
