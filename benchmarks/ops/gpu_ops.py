"""The Triton kernels on a GPU: checked against the specification, then timed against dense attention.

    python -m benchmarks.ops.gpu_ops --out out/gpu_ops.json

A kernel whose check fails is not timed, nor is anything that calls it. Both calls of a comparison alternate
in one run; a figure is the median of the rounds, the level 2 cache flushed before each. The operations are
called as a user calls them, input checks included. No figure of a GPU exists yet.
"""

import json
import platform
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.ops.gpu_inputs import (
    DTYPE,
    GQA,
    TOPK,
    V32,
    Shape,
    attention_inputs,
    causal,
    differs,
    index_inputs,
    normal,
    random_selection,
)
from benchmarks.ops.gpu_losses import LOSSES, both_backends, check_losses
from fulmen.files import atomic_write
from fulmen.ops.attention.sparse import sparse_attention
from fulmen.ops.attention.sparse.reference import sparse_attention_reference
from fulmen.ops.dispatch import pin_backend
from fulmen.ops.scores import index_scores
from fulmen.ops.scores.reference import index_scores_reference
from fulmen.ops.topk import index_topk, select_topk
from fulmen.ops.triton_support import triton_reason

LIBRARIES = ("torch", "triton", "flash-attn", "fulmen")
FLUSH_BYTES = 2**28


class Case(NamedTuple):
    """What is compared.

    Attributes:
        name: for the table.
        needs: the checks that must have passed.
        make_calls: makes what is timed in turn; "dsa" is fulmen's.
        bytes: that fulmen's must read at least, or 0.
        flops: that fulmen's must do, or 0.
    """

    name: str
    needs: tuple[str, ...]
    make_calls: Callable[[], dict[str, Callable[[], Any]]]
    bytes: int = 0
    flops: float = 0.0


def main(
    out: Annotated[Path, typer.Option(help="JSON file.")] = Path("out/gpu_ops.json"),
    rounds: Annotated[int, typer.Option(help="Times that every call is run.")] = 20,
    tokens: Annotated[int, typer.Option(help="Longest context.")] = 131072,
) -> None:
    """Check, time, print a table and write everything to a JSON file."""
    if reason := triton_reason("cuda"):
        print(f"gpu_ops.py needs a GPU: {reason}")
        raise typer.Exit(1)
    failures = {name: check() for name, check in CHECKS.items()}
    for name, failure in failures.items():
        print(f"check {name}: {failure or 'ok'}")
    bandwidth = measured_bandwidth()
    results = []
    decoding = (decode_case(shape, tokens) for shape in (GQA, V32))
    for case in (*decoding, *prefill_cases(tokens), *kernel_cases()):
        broken = [name for name in case.needs if failures[name]]
        times = {} if broken else alternate(case.make_calls(), rounds)
        results.append(record(case, broken, times, bandwidth))
        print(row(results[-1]), flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    everything = {**machine(), "bandwidth": bandwidth, "failures": failures, "results": results}
    atomic_write(out, lambda temporary: temporary.write_text(json.dumps(everything, indent=1)))
    raise typer.Exit(any(failures.values()))


# ---- checks: None, or how a kernel differs from the specification


def check_scores() -> str | None:
    for shape in (GQA, V32):
        q, k, w = index_inputs(shape, 33, 700)
        found = index_scores(q, k, w, w, *causal(33, 700))
        wanted = index_scores_reference(q, k, w, w, *causal(33, 700)).scores_BTS
        if failure := differs(found, wanted, 1e-4):
            return failure
    return None


def check_selection() -> str | None:
    """Exact at length, with ties and NaN, against the torch backend; a query alone against all together."""
    noise = normal(1, 16, 20_000, dtype=torch.float32)
    interval = causal(16, 20_000)
    for scores in (noise, noise.round(), noise.relu(), noise.round() / (0 * noise.round())):
        chosen = select_topk(scores, *interval, TOPK)
        with pin_backend("torch"):
            if not torch.equal(chosen, select_topk(scores, *interval, TOPK)):
                return "selects other keys than the torch backend"
    for shape in (GQA, V32):
        q, k, w = index_inputs(shape, 16, 20_000)
        together = index_topk(q, k, w, None, *interval, TOPK)
        if not torch.equal(together, select_topk(index_scores(q, k, w, None, *interval), *interval, TOPK)):
            return "index_topk is not select_topk of index_scores"
        last = (slice(None), slice(15, 16))
        alone = index_topk(q[last], k, w[last], None, *(x[last] for x in interval), TOPK)
        if not torch.equal(alone, together[last]):
            return "a query alone selects other keys than among others"
    return None


def check_attention(queries: int, deterministic: bool = False) -> str | None:
    for shape in (GQA, V32):
        qkv = attention_inputs(shape, queries, 3000, grad=True)
        topk = torch.rand(1, queries, 3000, device="cuda").argsort(-1)[..., :700].int()
        topk[..., ::5] = -1
        scale = shape.heads[2] ** -0.5
        wanted = sparse_attention_reference(*qkv, topk, scale)
        found = sparse_attention(*qkv, topk, scale)
        weights = [normal(*x.shape, seed=9, dtype=x.dtype) for x in found]
        grads = torch.autograd.grad([wanted.out_BTHV, wanted.lse_BTH], qkv, weights)
        torch.use_deterministic_algorithms(deterministic)
        try:
            own = torch.autograd.grad(found, qkv, weights, retain_graph=True)
            again = torch.autograd.grad(found, qkv, weights)
        finally:
            torch.use_deterministic_algorithms(False)
        if deterministic and not all(torch.equal(a, b) for a, b in zip(own, again, strict=True)):
            return "the gradients differ from run to run"
        for a, b in zip((*found, *own), (wanted.out_BTHV, wanted.lse_BTH, *grads), strict=True):
            if failure := differs(a, b, 2e-2):
                return failure
    return None


def pinned(check: Callable[..., str | None], *arguments: Any) -> Callable[[], str | None]:
    """The check with every kernel pinned; what it raises is a failure too."""

    def run() -> str | None:
        try:
            with pin_backend("triton"):
                return check(*arguments)
        except Exception as error:  # a kernel that does not compile must not end the run
            return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"

    return run


CHECKS = {
    "scores": pinned(check_scores),
    "selection": pinned(check_selection),
    "decode attention": pinned(check_attention, 1),
    "attention": pinned(check_attention, 33),
    "deterministic attention": pinned(check_attention, 33, True),
    "losses": pinned(check_losses),
}


# ---- cases


def decode_case(shape: Shape, tokens: int) -> Case:
    """One token after `tokens` - 1, one layer, batch 1."""
    (H, G, D, V), (_, index_keys, E) = shape.heads, shape.index_heads
    # V3.2 keeps one latent per token; its values are the first V numbers of it.
    value_width = 0 if G == 1 else V
    floor = 2 * (tokens * index_keys * E + TOPK * G * (D + value_width))
    needs = ("scores", "selection", "decode attention")
    return Case(
        f"decode at {tokens}, {H}/{G} heads", needs, partial(attention_calls, shape, 1, tokens), floor
    )


def prefill_cases(tokens: int) -> Iterator[Case]:
    """A whole text, one layer."""
    needs = ("scores", "selection", "attention")
    for length in (tokens // 2, tokens):
        yield Case(f"prefill of {length}, 32/8 heads", needs, partial(attention_calls, GQA, length, length))


def kernel_cases() -> Iterator[Case]:
    """The indexer's losses; sparse attention of V3.2's shape alone, forward and backward."""
    queries, keys = 4096, 65536
    H, _, D, V = V32.heads
    pairs = 2.0 * queries * TOPK * H

    def forward() -> dict[str, Callable[[], Any]]:
        qkv, topk = attention_inputs(V32, queries, keys), random_selection(queries, keys)
        return {"dsa": lambda: sparse_attention(*qkv, topk, D**-0.5)}

    def backward() -> dict[str, Callable[[], Any]]:
        qkv, topk = attention_inputs(V32, queries, keys, grad=True), random_selection(queries, keys)
        out, _ = sparse_attention(*qkv, topk, D**-0.5)
        dout = normal(*out.shape, seed=9)
        return {"dsa": lambda: torch.autograd.grad(out, qkv, dout, retain_graph=True)}

    for name in LOSSES:
        calls = partial(both_backends, name, 192, 32768)
        yield Case(f"{name}, 192 rows of 32K", ("losses",), calls)
    yield Case("sparse MLA forward", ("attention",), forward, flops=pairs * (D + V))
    yield Case("sparse MLA backward", ("attention",), backward, flops=pairs * (3 * D + 2 * V))


def attention_calls(shape: Shape, queries: int, keys: int) -> dict[str, Callable[[], Any]]:
    index, qkv = index_inputs(shape, queries, keys), attention_inputs(shape, queries, keys)
    interval, scale = causal(queries, keys), shape.heads[2] ** -0.5
    fixed = index_topk(*index, None, *interval, TOPK)

    def dsa() -> Any:
        return sparse_attention(*qkv, index_topk(*index, None, *interval, TOPK), scale)

    return {
        "dsa": dsa,
        "selection alone": lambda: index_topk(*index, None, *interval, TOPK),
        "sparse attention alone": lambda: sparse_attention(*qkv, fixed, scale),
        **dense_calls(*(x.transpose(1, 2).contiguous() for x in qkv), scale),
    }


def dense_calls(q_BHTD: Tensor, k_BGSD: Tensor, v_BGSV: Tensor, scale: float) -> dict[str, Callable[[], Any]]:
    """Dense peers that can be had here."""
    decoding = q_BHTD.shape[2] == 1
    if k_BGSD.shape[1] == 1:  # no library attends to 576-wide latents: two products

        def products() -> Tensor:
            return (q_BHTD[0, :, 0] @ k_BGSD[0, 0].T * scale).float().softmax(-1).to(DTYPE) @ v_BGSV[0, 0]

        return {"dense, two products": products}
    calls: dict[str, Callable[[], Any]] = {
        "dense, SDPA": lambda: scaled_dot_product_attention(
            q_BHTD, k_BGSD, v_BGSV, is_causal=not decoding, scale=scale, enable_gqa=True
        )
    }
    try:
        from flash_attn import flash_attn_func

        qkv = [x.transpose(1, 2).contiguous() for x in (q_BHTD, k_BGSD, v_BGSV)]
        calls["dense, FlashAttention"] = lambda: flash_attn_func(*qkv, softmax_scale=scale, causal=True)
    except ImportError:
        print("flash-attn is not installed: left out")
    if not decoding:
        calls["dense, FlexAttention"] = flex_call(q_BHTD, k_BGSD, v_BGSV, scale)
    return calls


def flex_call(q_BHTD: Tensor, k_BGSD: Tensor, v_BGSV: Tensor, scale: float) -> Callable[[], Any]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    length = q_BHTD.shape[2]
    blocks = create_block_mask(lambda b, h, t, s: t >= s, None, None, length, length, device="cuda")
    compiled = torch.compile(flex_attention)
    return lambda: compiled(q_BHTD, k_BGSD, v_BGSV, block_mask=blocks, scale=scale, enable_gqa=True)


# ---- timing and results


def alternate(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each round of each call, call after call; two rounds before that do not count."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    for number in range(rounds + 2):
        for name, run in calls.items():
            flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            torch.cuda.synchronize()
            if number >= 2:
                times[name].append(start.elapsed_time(end))
    return times


def measured_bandwidth() -> float:
    """Bytes a second of a copy, both directions counted."""
    source = torch.empty(2**30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    times = alternate({"copy": lambda: target.copy_(source)}, 10)["copy"]
    return 2 * source.numel() / (statistics.median(times) * 1e-3)


def record(case: Case, broken: list[str], times: dict[str, list[float]], bandwidth: float) -> dict[str, Any]:
    result: dict[str, Any] = {"case": case.name, "not timed, failed": broken, "ms": times}
    if not times:
        return result
    medians = {name: statistics.median(ms) for name, ms in times.items()}
    result["median ms"] = medians
    pairs = {
        name: zip(ms, times["dsa"], strict=True) for name, ms in times.items() if name.startswith("dense")
    }
    result["times faster"] = {name: statistics.median(a / b for a, b in pair) for name, pair in pairs.items()}
    if case.bytes:
        result["over the floor"] = medians["dsa"] * 1e-3 / (case.bytes / bandwidth)
    if case.flops:
        result["TFLOP/s"] = case.flops / (medians["dsa"] * 1e-3) / 1e12
    return result


def row(result: dict[str, Any]) -> str:
    if result["not timed, failed"]:
        return f"| {result['case']} | not timed: {', '.join(result['not timed, failed'])} failed |"
    cells = [f"{name} {ms:.3f} ms" for name, ms in result["median ms"].items()]
    cells += [f"{ratio:.2f} times faster than {name}" for name, ratio in result["times faster"].items()]
    cells += [f"{result[key]:.2f} {key}" for key in ("over the floor", "TFLOP/s") if key in result]
    return f"| {result['case']} | {' | '.join(cells)} |"


def machine() -> dict[str, Any]:
    return {
        "command": " ".join(sys.argv),
        "gpu": torch.cuda.get_device_name(),
        "cuda": torch.version.cuda or torch.version.hip,
        "python": platform.python_version(),
        "versions": {name: library_version(name) for name in LIBRARIES},
    }


def library_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    typer.run(main)
