"""What the Triton kernels take of GPUs that are not here: registers, spilled bytes, shared memory.

    python -m benchmarks.gpu.compiled --targets sm_90 --models qwen3-8b --out out/compiled.json

The interpreter accepts much that the compiler refuses, and tells nothing of this. Every paged kernel is
compiled as a step starts it, decoding and reading a prompt, and those of the indexer's losses as training
does; nothing is launched: results are garbage. Must not run interpreted (TRITON_INTERPRET unset). With
`--markdown` the table of docs/gpu.md is printed.
"""

import dataclasses
import json
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import triton
import typer
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from benchmarks.gpu.shapes import BLOCK_SIZE, MODELS, ModelShape, decoding_step
from fulmen.files import atomic_write
from fulmen.ops.losses.indexer.triton import indexer_loss_selected_triton, indexer_loss_triton
from fulmen.ops.losses.indexer.triton_backward import fill_gradients, gradients_to_fill
from fulmen.ops.losses.indexer.triton_scores import scores_of_chunk
from fulmen.ops.losses.indexer.triton_tiles import Chunk, interval_keys
from fulmen.ops.losses.selection.triton_gates import Gates, attend_with_gates, gate_gradients
from fulmen.ops.paged.layer import NewTokens
from fulmen.ops.paged.triton_requests import attend_requests_triton
from fulmen.ops.paged.triton_store import store_tokens_triton

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Bytes of shared memory that a block of threads may have; registers of a thread.
SHARED_LIMITS = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
MOST_REGISTERS = {"sm_80": 255, "sm_90": 255, "sm_100": 255, "gfx942": 512}
KEYS = 131072
STEPS = ("decode", "prompt", "train")


class Compiled(NamedTuple):
    """One kernel for one target. spilled: bytes (NVIDIA: of the stack; AMD: registers)."""

    target: str
    model: str
    step: str
    kernel: str
    registers: int
    spilled: int
    shared: int


class AbsentGpu:
    """What Triton asks a driver before it compiles."""

    def __init__(self, name: str) -> None:
        self.name, self.target = name, TARGETS[name]

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        # Compiled kernels are kept by device.
        return list(TARGETS).index(self.name)

    def get_current_stream(self, device: int) -> int:
        return 0


def main(
    targets: Annotated[str, typer.Option(help="Some of sm_80,sm_90,sm_100,gfx942.")] = ",".join(TARGETS),
    models: Annotated[str, typer.Option(help=f"Some of {','.join(MODELS)}.")] = ",".join(MODELS),
    steps: Annotated[str, typer.Option(help=f"Some of {','.join(STEPS)}.")] = ",".join(STEPS),
    out: Annotated[Path, typer.Option(help="JSON file.")] = Path("out/compiled.json"),
    markdown: Annotated[bool, typer.Option(help="Print a Markdown table.")] = False,
) -> None:
    """Compile, print a line a kernel, write JSON."""
    found = []
    for target in targets.split(","):
        for model in models.split(","):
            for one in compile_model(target, model, tuple(steps.split(","))):
                found.append(one)
                print(*one, flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps([one._asdict() for one in found], indent=1)
    atomic_write(out, lambda temporary: temporary.write_text(text))
    if markdown:
        print("\n".join(table_of(found)))
    raise typer.Exit(int(any(reason_against(one) for one in found)))


def compile_model(target: str, model: str, steps: tuple[str, ...]) -> list[Compiled]:
    """All kernels of the steps of `model`, in the order in which they would start, each once."""
    found: dict[tuple[str, str], Compiled] = {}

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        taken = resources(target, kernel)
        one = Compiled(target, model, step, self.__name__.removeprefix("_").removesuffix("_kernel"), *taken)
        key = (step, one.kernel)
        found[key] = max(found.get(key, one), one, key=lambda x: (x.spilled, x.registers))

    driver.set_active(AbsentGpu(target))
    run, JITFunction.run = JITFunction.run, compile_only  # type: ignore[method-assign]
    try:
        for step in steps:
            if step == "train":
                start_losses(MODELS[model])
            else:
                start_all(MODELS[model], queries=1 if step == "decode" else 64)
    finally:
        JITFunction.run = run  # type: ignore[method-assign]
    return list(found.values())


def start_all(shape: ModelShape, queries: int) -> None:
    """A step of two requests as long as can be, of which the compiler learns nothing but sizes."""
    layer, requests, q_THD, index = decoding_step(shape, 2, 2 * queries, "cpu", queries)
    block_BN = requests.block_BN.repeat(1, KEYS // BLOCK_SIZE)
    requests = dataclasses.replace(requests, block_BN=block_BN, most_keys=KEYS)
    count = len(q_THD)
    angles_TP = torch.zeros(count, shape.width // 2, dtype=q_THD.dtype)
    row_T = torch.zeros(count, dtype=torch.int64)
    tokens = NewTokens(row_T, row_T, angles_TP, angles_TP, row_T)
    names = ("q", "k", "v", "index_q", "index_k", "coarse_q", "coarse_k")
    store_tokens_triton(layer, tokens, *(q_THD.new_zeros(count, *layer.shapes[name]) for name in names))
    attend_requests_triton(layer, requests, q_THD, index, torch.empty_like(q_THD))


def start_losses(shape: ModelShape) -> None:
    """The indexer's losses, forward and backward, for some queries of a text, as training starts them."""
    queries, keys = 64, 4096

    def zeros(*sizes: int) -> Tensor:
        return torch.zeros(1, *sizes, dtype=torch.bfloat16, requires_grad=True)

    index_q_BTJE = zeros(queries, shape.index_heads, shape.index_width)
    index_k_BSIE = zeros(keys, shape.index_key_heads, shape.index_width)
    w_BTJ, b_BTJ = zeros(queries, shape.index_heads), zeros(queries, shape.index_heads)
    attention = (zeros(queries, shape.heads, shape.width), zeros(keys, shape.key_heads, shape.width))
    ends = (torch.zeros(1, queries, dtype=torch.int32), torch.full((1, queries), keys, dtype=torch.int32))
    topk_BTK = torch.zeros(1, queries, shape.topk, dtype=torch.int32)
    arguments = (index_q_BTJE, index_k_BSIE, w_BTJ, b_BTJ, *(x.detach() for x in attention))
    for loss in (
        indexer_loss_triton(*arguments, *ends, shape.width**-0.5, None, None),
        indexer_loss_selected_triton(*arguments, topk_BTK, shape.width**-0.5, None, None),
    ):
        loss.kl_BT.sum().backward()
    start_gates(shape, *(x.detach().float() for x in (*arguments, attention[1])), *ends)


def start_gates(
    shape: ModelShape,
    q_BTJE: Tensor,
    k_BSIE: Tensor,
    w_BTJ: Tensor,
    b_BTJ: Tensor,
    attn_q_BTHD: Tensor,
    attn_k_BSGD: Tensor,
    attn_v_BSGV: Tensor,
    start_BT: Tensor,
    stop_BT: Tensor,
) -> None:
    """The kernels of `selection_loss`, which computes in float32: without its cut, as garbage has none."""
    index, attention = (q_BTJE, k_BSIE, w_BTJ, b_BTJ), (attn_q_BTHD, attn_k_BSGD, attn_v_BSGV)
    keys = interval_keys(start_BT, stop_BT, k_BSIE.shape[1])
    chunk, scale = Chunk(0, q_BTJE.shape[1]), shape.width**-0.5
    gates = Gates(scores_of_chunk(*index, keys, chunk), torch.zeros(start_BT.shape), 1.0)
    out_BTHV, lse_BTH = torch.empty_like(attn_q_BTHD), torch.empty(attn_q_BTHD.shape[:3])
    attend_with_gates(*attention, keys, chunk, gates, scale, None, out_BTHV, lse_BTH)
    rows = (out_BTHV, lse_BTH, lse_BTH)
    dscores_BRC = gate_gradients(*attention, *rows, keys, chunk, gates, scale, None)
    fill_gradients(dscores_BRC, chunk, keys, index, gradients_to_fill(*index))


def resources(target: str, kernel: Any) -> tuple[int, int, int]:
    """Registers of a thread, what of them is spilled, bytes of shared memory."""
    shared = kernel.metadata.shared
    if target.startswith("gfx"):
        text = kernel.asm["amdgcn"]
        return (
            number_in(text, r"\.vgpr_count:\s+(\d+)"),
            number_in(text, r"\.vgpr_spill_count:\s+(\d+)"),
            shared,
        )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return number_in(text, r"REG:(\d+)"), number_in(text, r"STACK:(\d+)"), shared


def number_in(text: str, pattern: str) -> int:
    found = re.search(pattern, text)
    assert found, pattern
    return int(found[1])


def reason_against(one: Compiled) -> str | None:
    """Why a kernel would be slow or not start on its target; None if it is fine."""
    if one.spilled:
        return f"{one.kernel} spills {one.spilled}"
    if one.shared > SHARED_LIMITS[one.target]:
        return f"{one.kernel} takes {one.shared} bytes of shared memory"
    if one.registers > MOST_REGISTERS[one.target]:
        return f"{one.kernel} takes {one.registers} registers"
    return None


def table_of(found: list[Compiled]) -> list[str]:
    """A Markdown table: a line for each target and model, a column for each kernel of a step."""
    columns = sorted({(one.kernel.removeprefix("paged_"), one.step) for one in found})
    lines = ["| target | model | " + " | ".join(", ".join(column) for column in columns) + " |"]
    lines.append("|---" * (len(columns) + 2) + "|")
    for target, model in dict.fromkeys((one.target, one.model) for one in found):
        own = {
            (one.kernel.removeprefix("paged_"), one.step): one
            for one in found
            if (one.target, one.model) == (target, model)
        }
        cells = [cell_of(own[column]) if column in own else "" for column in columns]
        lines.append(f"| {target} | {model} | " + " | ".join(cells) + " |")
    return lines


def cell_of(one: Compiled) -> str:
    """Registers, KB of shared memory, and what is spilled, if something is."""
    spilled = f", {one.spilled} spilled" if one.spilled else ""
    return f"{one.registers}, {round(one.shared / 1024)}{spilled}"


if __name__ == "__main__":
    assert not os.environ.get("TRITON_INTERPRET"), "unset TRITON_INTERPRET"
    typer.run(main)
