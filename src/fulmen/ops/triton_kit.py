"""What the Triton kernels share: their block sizes, and how they read rows of heads.

Sizes are powers of 2, none below 16 where a matrix product meets them. All are here, so that another GPU
means another table. They are first guesses for an H100 that no GPU has timed
(`benchmarks/ops/gpu_ops.py` does).
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fulmen.ops.common.interpreter import is_interpreted

SMALLEST_PRODUCT = 16
KERNEL_LOG2_E = tl.constexpr(1.4426950408889634)
# Of each kernel: rows and columns of its tiles, and how Triton compiles it.
KERNEL_SIZES = {
    # rows: queries x index heads of one key head; columns: keys
    "index_scores": {"rows": 64, "columns": 128, "num_warps": 4, "num_stages": 3},
    # columns: scores of one step through a row
    "select": {"columns": 4096, "num_warps": 16, "num_stages": 2},
    # rows: heads of one key head, at most; columns: selected keys
    "attend": {"rows": 64, "columns": 64, "num_warps": 4, "num_stages": 2},
    "attend_wide": {"rows": 64, "columns": 32, "num_warps": 8, "num_stages": 1},
    "merge": {"num_warps": 4, "num_stages": 1},
    "attend_backward": {"rows": 32, "columns": 32, "num_warps": 4, "num_stages": 1},
    "attend_backward_wide": {"rows": 16, "columns": 16, "num_warps": 8, "num_stages": 1},
    # rows: queries x heads that read one key
    "key_gradients": {"rows": 32, "num_warps": 4, "num_stages": 1},
    "key_gradients_wide": {"rows": 8, "num_warps": 8, "num_stages": 1},
    # rows: queries x heads of one key head; queries: of an interval, of a selection 1; columns: keys
    "loss_lse": {"rows": 64, "queries": 16, "columns": 64, "num_warps": 4, "num_stages": 2},
    "loss_lse_wide": {"rows": 64, "queries": 16, "columns": 32, "num_warps": 8, "num_stages": 1},
    "loss": {"rows": 64, "queries": 16, "columns": 64, "num_warps": 4, "num_stages": 1},
    "loss_wide": {"rows": 64, "queries": 16, "columns": 32, "num_warps": 8, "num_stages": 1},
    "loss_row": {"columns": 1024, "num_warps": 4, "num_stages": 1},
    "loss_gradients": {"rows": 32, "queries": 16, "columns": 32, "num_warps": 8, "num_stages": 1},
    "loss_gradients_wide": {"rows": 16, "queries": 16, "columns": 16, "num_warps": 4, "num_stages": 1},
    "loss_gates": {"rows": 32, "queries": 16, "columns": 32, "num_warps": 4, "num_stages": 1},
    "loss_gates_wide": {"rows": 16, "queries": 16, "columns": 16, "num_warps": 8, "num_stages": 1},
    # rows: queries x index heads that read one key
    "loss_selected_keys": {"rows": 32, "num_warps": 4, "num_stages": 1},
    # Over paged caches (`ops/paged/triton_*.py`). rows: queries x index heads of one key head, of prompts and
    # of decoding; columns: keys
    "paged_scores": {"rows": 64, "columns": 32, "num_warps": 8, "num_stages": 1},
    "paged_scores_few": {"rows": 16, "columns": 64, "num_warps": 4, "num_stages": 2},
    # The same of a coarse level, whose one key head all heads read.
    "paged_coarse": {"rows": 64, "columns": 128, "num_warps": 8, "num_stages": 1},
    "paged_coarse_few": {"rows": 16, "columns": 256, "num_warps": 8, "num_stages": 1},
    # columns: candidates of one query
    "paged_fine": {"columns": 128, "num_warps": 8, "num_stages": 1},
    # columns: scores, or what earlier rounds left of them, that a program holds in registers
    "paged_select": {"columns": 8192, "num_warps": 16, "num_stages": 1},
    "paged_candidates": {"columns": 8192, "num_warps": 16, "num_stages": 1},
    "paged_attend": {"rows": 64, "columns": 64, "num_warps": 4, "num_stages": 2},
    # rows: queries x heads that read one key
    "paged_dense": {"rows": 64, "columns": 64, "num_warps": 8, "num_stages": 2},
    "paged_attend_wide": {"rows": 64, "columns": 32, "num_warps": 8, "num_stages": 1},
    "paged_dense_wide": {"rows": 64, "columns": 32, "num_warps": 8, "num_stages": 1},
    "paged_merge": {"num_warps": 4, "num_stages": 1},
    # rows: heads of a token
    "paged_store": {"rows": 8, "num_warps": 2, "num_stages": 1},
}
# Heads wider than this (absorbed latents) take the table's "_wide" entries.
WIDE_HEAD = 256


def kernel_sizes(name: str, width: int = 0) -> dict[str, int]:
    """The table's entry for a kernel on heads of `width` numbers."""
    return KERNEL_SIZES[f"{name}_wide" if width > WIDE_HEAD else name]


def compile_options(sizes: dict[str, int]) -> dict[str, int]:
    """How to compile a kernel with these sizes."""
    return {name: sizes[name] for name in ("num_warps", "num_stages")}


def power_of_2(n: int, least: int = 1) -> int:
    """The least power of 2 that is neither below `n` nor below `least`."""
    return max(triton.next_power_of_2(max(n, 1)), least)


def split_width(width: int) -> tuple[int, int]:
    """Two powers of 2 that hold a head of `width` numbers, little to spare: 576 = 512 + 64, 128 = 128 + 0.

    The second is 0 where the first holds all.
    """
    full = power_of_2(width, SMALLEST_PRODUCT)
    half = full // 2
    if full == width or half < SMALLEST_PRODUCT:
        return full, 0
    rest = power_of_2(width - half, SMALLEST_PRODUCT)
    return (half, rest) if rest < half else (full, 0)


def on_device_of(x: Tensor) -> AbstractContextManager:
    """Kernels go to the current device; inside this context that is the device of `x`."""
    return nullcontext() if x.device.type == "cpu" else getattr(torch, x.device.type).device(x.device)


def launch(kernel: Any, grid: Any, *arguments: Any, **options: Any) -> None:
    """Start a kernel, whose first argument is a tensor, on that one's device.

    Tensors on "meta" hold no numbers: for them all is done but the launch.
    """
    first = arguments[0]
    assert all(x.device == first.device for x in arguments if isinstance(x, Tensor)), kernel
    if first.device.type == "meta" or not all(grid):
        return
    with on_device_of(first):
        kernel[grid](*arguments, **options)


def product_dtype(x: Tensor) -> tl.dtype:
    """In which matrix products take their factors; they add in float32."""
    # The interpreter multiplies the bit patterns of bfloat16 (triton issue 11584).
    if is_interpreted() or x.dtype not in (torch.bfloat16, torch.float16):
        return tl.float32
    return tl.bfloat16 if x.dtype == torch.bfloat16 else tl.float16


def places_of_keys(topk_BTK: Tensor, n_keys: int) -> tuple[Tensor, Tensor]:
    """A selection by key: where it has each (t * K + column), those of key 0 first; where a key's begin.

    int32 `[B, T * K]`, ascending for each key, and int64 `[B, S + 1]`.
    """
    keys_BN = topk_BTK.masked_fill(topk_BTK < 0, n_keys).flatten(1)
    sorted_BN, place_BN = keys_BN.sort(dim=1, stable=True)
    key_S = torch.arange(n_keys + 1, dtype=torch.int32, device=topk_BTK.device)
    begin_BS = torch.searchsorted(sorted_BN, key_S.expand(len(sorted_BN), -1).contiguous())
    return place_BN.int(), begin_BS


def head_tiles(name: str, q_BTHD: Tensor, v_BSGV: Tensor) -> tuple[int, dict[str, Any]]:
    """How attention is cut into tiles of query heads that read one key head.

    Returns:
        Programs for each sequence and query, and the arguments at compile time of a kernel that begins with
        `heads_of_program`.
    """
    (heads, width), (n_key_heads, value_width) = q_BTHD.shape[2:], v_BSGV.shape[2:]
    sizes = kernel_sizes(name, width)
    shared = heads // n_key_heads
    block_heads = min(power_of_2(shared, SMALLEST_PRODUCT), sizes["rows"])
    head_blocks = triton.cdiv(shared, block_heads)
    first, rest = split_width(width)
    return n_key_heads * head_blocks, {
        "KEY_HEADS": n_key_heads,
        "SHARED": shared,
        "WIDTH": width,
        "VALUE_WIDTH": value_width,
        "BLOCK_HEADS": block_heads,
        "HEAD_BLOCKS": head_blocks,
        "BLOCK_KEYS": sizes["columns"],
        "BLOCK_FIRST": first,
        "BLOCK_REST": rest,
        "BLOCK_VALUE": power_of_2(value_width, SMALLEST_PRODUCT),
        "DTYPE": product_dtype(q_BTHD),
        **compile_options(sizes),
    }


@triton.jit
def heads_of_program(
    KEY_HEADS: tl.constexpr, SHARED: tl.constexpr, BLOCK_HEADS: tl.constexpr, HEAD_BLOCKS: tl.constexpr
):
    """batch, key_head, row (of batch and query), head_H (of rows and heads) and which of these there are."""
    key_head = tl.program_id(1) // HEAD_BLOCKS % KEY_HEADS
    batch = (tl.program_id(1) // (HEAD_BLOCKS * KEY_HEADS)).to(tl.int64)
    shared_H = tl.program_id(1) % HEAD_BLOCKS * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    row = batch * tl.num_programs(0) + tl.program_id(0)
    head_H = row * (KEY_HEADS * SHARED) + key_head * SHARED + shared_H
    return batch, key_head, row, head_H, shared_H < SHARED


@triton.jit
def load_rows(
    base,
    offsets_R,
    inside_R,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """`[R, BLOCK]`: the numbers FIRST.. of rows that start at `base + offsets_R`; 0 outside of them."""
    columns = FIRST + tl.arange(0, BLOCK)
    inside_RC = inside_R[:, None] & (columns < WIDTH)[None, :]
    return tl.load(base + offsets_R[:, None] + columns[None, :], mask=inside_RC, other=0.0).to(DTYPE)


@triton.jit
def product(a_MK, b_KN):
    """Matrix product in full precision: float32 factors are not rounded to tf32."""
    return tl.dot(a_MK, b_KN, input_precision="ieee")


@triton.jit
def tanh_of(x):
    """tanh(x), within 4 units in the last place; NaN where x is not finite. As `tanh_vec` in C++."""
    square = x * x
    near = x + x * square * (
        -0.333332866 + square * (0.133284643 + square * (-0.053146746 + square * 0.0172957517))
    )
    power = tl.exp2(tl.abs(x) * (-2 * KERNEL_LOG2_E))
    far = (1 - power) / (1 + power)
    return tl.where(tl.abs(x) < 0.55, near, tl.where(x < 0, -far, far)) + x * 0.0


@triton.jit
def load_selected(topk_K, low, stop, BLOCK: tl.constexpr):
    """Positions `low` <= i < `stop` of a query's selection: which key, as int64, and whether there is one.

    The one place that turns a selected position into a row of the cache: a block table would be read here.
    """
    index_K = low + tl.arange(0, BLOCK)
    key_K = tl.load(topk_K + index_K, mask=index_K < stop, other=-1)
    return tl.maximum(key_K, 0).to(tl.int64), key_K >= 0
