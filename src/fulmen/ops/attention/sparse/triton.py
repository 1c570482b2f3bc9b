"""Sparse attention by Triton kernels: the heads of one key head gather their query's keys together.

With few queries (decoding) a selection is cut into parts that are attended to side by side and then merged.
How it is cut depends on its length alone, so that a sequence has the same bits alone and in a batch.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from fulmen.ops.attention.sparse.triton_backward import sparse_attention_gradients
from fulmen.ops.common.intervals import kernel_positions
from fulmen.ops.common.opaque import SavedTensors
from fulmen.ops.cpp.library import row_major
from fulmen.ops.triton_kit import (
    KERNEL_LOG2_E,
    compile_options,
    head_tiles,
    heads_of_program,
    kernel_sizes,
    load_rows,
    load_selected,
    on_device_of,
    power_of_2,
    product,
    tanh_of,
)

LOWEST = tl.constexpr(-3.0e38)
# Up to this many queries a selection is cut.
DECODE_QUERIES = 8
# Keys of a part, at least, and how many parts there are at most.
PART_KEYS = 256
MOST_PARTS = 64


def sparse_gradients_triton(
    dout_BTHV: Tensor,
    dlse_BTH: Tensor,
    q_BTHD: Tensor,
    k_BSGD: Tensor,
    v_BSGV: Tensor,
    topk_BTK: Tensor,
    out_BTHV: Tensor,
    lse_BTH: Tensor,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq_BTHD, dk_BSGD and dv_BSGV."""
    tensors = (q_BTHD, k_BSGD, v_BSGV, topk_BTK, out_BTHV, lse_BTH)
    saved = SavedTensors(*tensors, scale=scale, softcap=softcap)
    backward: Any = TritonSparseAttention.backward
    return backward(saved, dout_BTHV, dlse_BTH)[:3]


def sparse_attention_triton(
    q_BTHD: Tensor,
    k_BSGD: Tensor,
    v_BSGV: Tensor,
    topk_BTK: Tensor,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """See `fulmen.ops.attention.sparse.sparse_attention`."""
    return TritonSparseAttention.apply(q_BTHD, k_BSGD, v_BSGV, topk_BTK, scale, softcap)


class TritonSparseAttention(torch.autograd.Function):
    """`apply(q_BTHD, k_BSGD, v_BSGV, topk_BTK, scale, softcap) -> (out_BTHV, lse_BTH)`."""

    @staticmethod
    def forward(
        ctx: Any,
        q_BTHD: Tensor,
        k_BSGD: Tensor,
        v_BSGV: Tensor,
        topk_BTK: Tensor,
        scale: float,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor]:
        topk_BTK = kernel_positions(topk_BTK)
        out_BTHV, lse_BTH = _attend(q_BTHD, k_BSGD, v_BSGV, topk_BTK, scale, softcap)
        ctx.save_for_backward(q_BTHD, k_BSGD, v_BSGV, topk_BTK, out_BTHV, lse_BTH)
        ctx.scale, ctx.softcap = scale, softcap
        return out_BTHV, lse_BTH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_BTHV: Tensor, dlse_BTH: Tensor) -> tuple[Tensor | None, ...]:
        q_BTHD, k_BSGD, v_BSGV, topk_BTK, out_BTHV, lse_BTH = ctx.saved_tensors
        # d loss / d score = prob * (dprob - delta)
        delta_BTH = (dout_BTHV.float() * out_BTHV).sum(-1) - dlse_BTH
        inputs = (q_BTHD, k_BSGD, v_BSGV)
        gradients = sparse_attention_gradients(
            *inputs, topk_BTK, dout_BTHV, lse_BTH, delta_BTH, ctx.scale, ctx.softcap
        )
        return *(grad.to(x.dtype) for grad, x in zip(gradients, inputs, strict=True)), None, None, None


def _attend(
    q_BTHD: Tensor,
    k_BSGD: Tensor,
    v_BSGV: Tensor,
    topk_BTK: Tensor,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    batch, queries, heads = q_BTHD.shape[:3]
    n_selected = topk_BTK.shape[-1]
    part_keys = _part_keys(queries, n_selected)
    n_parts = max(triton.cdiv(n_selected, part_keys), 1)
    dtype = q_BTHD.dtype if n_parts == 1 else torch.float32
    out_NBTHV = torch.empty(
        n_parts, batch, queries, heads, v_BSGV.shape[3], dtype=dtype, device=q_BTHD.device
    )
    lse_NBTH = torch.empty(n_parts, batch, queries, heads, dtype=torch.float32, device=q_BTHD.device)
    if not lse_NBTH.numel():
        return out_NBTHV[0], lse_NBTH[0]
    programs, tiles = head_tiles("attend", q_BTHD, v_BSGV)
    k_BSGD, v_BSGV = row_major(k_BSGD), row_major(v_BSGV)
    with on_device_of(q_BTHD):
        _attend_kernel[queries, batch * programs, n_parts](
            *(q_BTHD.contiguous(), k_BSGD, v_BSGV, topk_BTK, out_NBTHV, lse_NBTH),
            *(*k_BSGD.stride()[:3], *v_BSGV.stride()[:3]),
            *(batch, n_selected, part_keys, scale, softcap or 0.0),
            CAPPED=softcap is not None,
            **tiles,
        )
        return (out_NBTHV[0], lse_NBTH[0]) if n_parts == 1 else _merge(out_NBTHV, lse_NBTH, q_BTHD.dtype)


def _part_keys(queries: int, n_selected: int) -> int:
    if queries > DECODE_QUERIES:
        return max(n_selected, 1)
    return max(PART_KEYS, power_of_2(triton.cdiv(n_selected, MOST_PARTS)))


def _merge(out_NBTHV: Tensor, lse_NBTH: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    out_BTHV, lse_BTH = torch.empty_like(out_NBTHV[0], dtype=dtype), torch.empty_like(lse_NBTH[0])
    _merge_kernel[(lse_BTH.numel(),)](
        *(out_NBTHV, lse_NBTH, out_BTHV, lse_BTH, lse_BTH.numel(), len(lse_NBTH)),
        WIDTH=out_BTHV.shape[-1],
        BLOCK_PARTS=power_of_2(len(lse_NBTH)),
        BLOCK_WIDTH=power_of_2(out_BTHV.shape[-1]),
        **compile_options(kernel_sizes("merge")),
    )
    return out_BTHV, lse_BTH


@triton.jit
def _attend_kernel(
    q_BTHD,
    k_BSGD,
    v_BSGV,
    topk_BTK,
    out_NBTHV,
    lse_NBTH,
    k_stride_b,
    k_stride_s,
    k_stride_g,
    v_stride_b,
    v_stride_s,
    v_stride_g,
    n_batch,
    n_selected,
    part_keys,
    scale,
    softcap,
    CAPPED: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    SHARED: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    HEAD_BLOCKS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_FIRST: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    DTYPE: tl.constexpr,
):
    part, n_queries = tl.program_id(2), tl.num_programs(0)
    batch, key_head, row, head_H, present_H = heads_of_program(KEY_HEADS, SHARED, BLOCK_HEADS, HEAD_BLOCKS)
    k_base = k_BSGD + batch * k_stride_b + key_head * k_stride_g
    v_base = v_BSGV + batch * v_stride_b + key_head * v_stride_g

    q_HD = load_rows(q_BTHD, head_H * WIDTH, present_H, 0, WIDTH, BLOCK_FIRST, DTYPE)
    if BLOCK_REST > 0:
        q_HR = load_rows(q_BTHD, head_H * WIDTH, present_H, BLOCK_FIRST, WIDTH, BLOCK_REST, DTYPE)
    # Finite, so that a part whose keys are all hidden so far subtracts no infinity from another.
    peak_H = tl.full([BLOCK_HEADS], LOWEST, tl.float32)
    total_H = tl.zeros([BLOCK_HEADS], tl.float32)
    sum_HV = tl.zeros([BLOCK_HEADS, BLOCK_VALUE], tl.float32)
    n_chosen = part * 0
    factor = (softcap if CAPPED else scale) * KERNEL_LOG2_E
    last = tl.minimum((part + 1) * part_keys, n_selected)
    for low in range(part * part_keys, last, BLOCK_KEYS):
        key_K, chosen_K = load_selected(topk_BTK + row * n_selected, low, last, BLOCK_KEYS)
        k_KD = load_rows(k_base, key_K * k_stride_s, chosen_K, 0, WIDTH, BLOCK_FIRST, DTYPE)
        scores_HK = product(q_HD, tl.trans(k_KD))
        if BLOCK_REST > 0:
            k_KR = load_rows(k_base, key_K * k_stride_s, chosen_K, BLOCK_FIRST, WIDTH, BLOCK_REST, DTYPE)
            scores_HK += product(q_HR, tl.trans(k_KR))
        if CAPPED:
            scores_HK = tanh_of(scores_HK * (scale / softcap))
        scores_HK = tl.where(chosen_K[None, :], scores_HK * factor, float("-inf"))
        higher_H = tl.maximum(peak_H, tl.max(scores_HK, 1))
        fade_H = tl.exp2(peak_H - higher_H)
        weights_HK = tl.exp2(scores_HK - higher_H[:, None])
        total_H = total_H * fade_H + tl.sum(weights_HK, 1)
        v_KV = load_rows(v_base, key_K * v_stride_s, chosen_K, 0, VALUE_WIDTH, BLOCK_VALUE, DTYPE)
        sum_HV = sum_HV * fade_H[:, None] + product(weights_HK.to(DTYPE), v_KV)
        peak_H = higher_H
        n_chosen += tl.sum(chosen_K.to(tl.int32), 0)

    value_V = tl.arange(0, BLOCK_VALUE)
    # Keys that are there, but weigh nothing, have scores of -inf alone: as their softmax, no number.
    total_H = tl.where((total_H == 0) & (n_chosen > 0), float("nan"), total_H)
    divisor_H = tl.where(total_H == 0, 1.0, total_H)
    out_HV = sum_HV / divisor_H[:, None]
    lse_H = tl.where(total_H == 0, float("-inf"), (peak_H + tl.log2(divisor_H)) / KERNEL_LOG2_E)
    place_H = part.to(tl.int64) * n_batch * n_queries * (KEY_HEADS * SHARED) + head_H
    inside_HV = present_H[:, None] & (value_V < VALUE_WIDTH)[None, :]
    tl.store(out_NBTHV + place_H[:, None] * VALUE_WIDTH + value_V[None, :], out_HV, mask=inside_HV)
    tl.store(lse_NBTH + place_H, lse_H, mask=present_H)


@triton.jit
def _merge_kernel(
    out_NRV,
    lse_NR,
    out_RV,
    lse_R,
    n_rows,
    n_parts,
    WIDTH: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    part_N, value_V = tl.arange(0, BLOCK_PARTS), tl.arange(0, BLOCK_WIDTH)
    place_N = part_N * n_rows + row
    lse_N = tl.load(lse_NR + place_N, mask=part_N < n_parts, other=float("-inf"))
    peak = tl.maximum(tl.max(lse_N, 0), LOWEST)
    weight_N = tl.exp2((lse_N - peak) * KERNEL_LOG2_E)
    total = tl.sum(weight_N, 0)
    divisor = tl.where(total == 0, 1.0, total)
    inside_NV = (part_N < n_parts)[:, None] & (value_V < WIDTH)[None, :]
    part_NV = tl.load(out_NRV + place_N[:, None] * WIDTH + value_V[None, :], mask=inside_NV, other=0.0)
    sum_V = tl.sum(part_NV * weight_N[:, None], 0)
    tl.store(out_RV + row * WIDTH + value_V, sum_V / divisor, mask=value_V < WIDTH)
    tl.store(lse_R + row, tl.where(total == 0, float("-inf"), peak + tl.log2(divisor) / KERNEL_LOG2_E))
