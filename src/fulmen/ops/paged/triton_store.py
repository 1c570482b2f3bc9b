"""New tokens into paged caches on a GPU: RoPE, keys and values, and index keys in 8 bits; two launches.

To the bit what `store_tokens_composed` writes, as a token that decoding stores is read beside those of a
prompt: products are rounded to the model's dtype one by one, as torch rounds them, and never fused.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fulmen.ops.common.index_keys import INT8_MOST
from fulmen.ops.paged.layer import NewTokens, PagedLayer
from fulmen.ops.triton_kit import compile_options, kernel_sizes, launch, power_of_2

KERNEL_INT8_MOST = tl.constexpr(float(INT8_MOST))
# Adding it rounds a smaller float32 to an integer, halves to the even one.
ROUNDER = tl.constexpr(1.5 * 2**23)


def store_tokens_triton(
    layer: PagedLayer,
    tokens: NewTokens,
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    index_q_TJE: Tensor | None,
    index_k_TIE: Tensor,
    coarse_q_TMN: Tensor | None = None,
    coarse_k_TN: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """See `fulmen.ops.paged.layer.store_tokens`. Tokens of negative rows are padding, and not stored."""
    rotated_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
    _launch_store(layer, tokens, q_THD, k_TGD, v_TGD, rotated_THD)
    first = (layer.packed_RX, tokens.index_rows_T, layer.rope_pairs_IP)
    index_out_TJE = _launch_index(tokens, *first, index_q_TJE, index_k_TIE)
    if layer.coarse is None or coarse_k_TN is None or tokens.coarse_rows_T is None:
        return rotated_THD, index_out_TJE, None
    second = (layer.coarse.packed_RX, tokens.coarse_rows_T, layer.coarse.rope_pairs_P[None])
    return rotated_THD, index_out_TJE, _launch_index(tokens, *second, coarse_q_TMN, coarse_k_TN[:, None])


def _launch_store(
    layer: PagedLayer, tokens: NewTokens, q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, out_THD: Tensor
) -> None:
    sizes, (count, heads, width) = kernel_sizes("paged_store"), q_THD.shape
    q_blocks, k_blocks = (triton.cdiv(x.shape[1], sizes["rows"]) for x in (q_THD, k_TGD))
    pairs = tokens.cos_TP.shape[1]
    launch(
        *(_paged_store_kernel, (count, q_blocks + k_blocks), q_THD, k_TGD, v_TGD, out_THD, layer.kv_RGC),
        *(tokens.rows_T, tokens.cos_TP, tokens.sin_TP, tokens.cos_TP.stride(0), tokens.sin_TP.stride(0)),
        *(stride for x in (q_THD, k_TGD, v_TGD) for stride in x.stride()),
        *layer.kv_RGC.stride()[:2],
        HEADS=heads,
        KEY_HEADS=k_TGD.shape[1],
        WIDTH=width,
        PAIRS=pairs,
        Q_BLOCKS=q_blocks,
        BLOCK_HEADS=sizes["rows"],
        BLOCK_PAIRS=power_of_2(pairs),
        BLOCK_REST=power_of_2(width - 2 * pairs) if width > 2 * pairs else 0,
        BLOCK_WIDTH=power_of_2(width),
        **_store_options(sizes),
    )


def _launch_index(
    tokens: NewTokens,
    packed_RX: Tensor,
    rows_T: Tensor,
    pairs_IP: Tensor,
    q_TJE: Tensor | None,
    k_TIE: Tensor,
) -> Tensor | None:
    """Index keys into their cache; returns the queries, rotated, if there are some."""
    count, key_heads, width = k_TIE.shape
    queries = k_TIE if q_TJE is None else q_TJE
    out_TJE = torch.empty(queries.shape, dtype=k_TIE.dtype, device=k_TIE.device)
    shared = queries.shape[1] // key_heads
    launch(
        *(_paged_index_kernel, (count, key_heads), queries, k_TIE, out_TJE, packed_RX, rows_T, pairs_IP),
        *(tokens.cos_TP, tokens.sin_TP, tokens.cos_TP.stride(0), tokens.sin_TP.stride(0)),
        *(*queries.stride(), *k_TIE.stride(), packed_RX.stride(0)),
        HAS_QUERIES=q_TJE is not None,
        SHARED=shared,
        WIDTH=width,
        PAIRS=tokens.cos_TP.shape[1],
        BLOCK_HEADS=power_of_2(shared),
        BLOCK_HALF=power_of_2(width // 2),
        **_store_options(kernel_sizes("paged_store")),
    )
    return None if q_TJE is None else out_TJE


def _store_options(sizes: dict[str, int]) -> dict[str, Any]:
    return {**compile_options(sizes), "enable_fp_fusion": False}


@triton.jit
def _paged_store_kernel(
    q_THD,
    k_TGD,
    v_TGD,
    out_THD,
    kv_RGC,
    rows_T,
    cos_TP,
    sin_TP,
    cos_stride,
    sin_stride,
    q_stride_t,
    q_stride_h,
    q_stride_d,
    k_stride_t,
    k_stride_h,
    k_stride_d,
    v_stride_t,
    v_stride_h,
    v_stride_d,
    row_stride,
    head_stride,
    HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    PAIRS: tl.constexpr,
    Q_BLOCKS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    token, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    pair_P = tl.arange(0, BLOCK_PAIRS)
    cos_P = tl.load(cos_TP + token * cos_stride + pair_P, mask=pair_P < PAIRS, other=0.0)
    sin_P = tl.load(sin_TP + token * sin_stride + pair_P, mask=pair_P < PAIRS, other=0.0)
    if block < Q_BLOCKS:
        head_H = block * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
        source_H = q_THD + token * q_stride_t + head_H * q_stride_h
        target_H = out_THD + (token * HEADS + head_H) * WIDTH
        _rotate_heads(
            *(source_H, q_stride_d, target_H, head_H < HEADS, cos_P, sin_P),
            *(WIDTH, PAIRS, BLOCK_PAIRS, BLOCK_REST),
        )
    else:
        row = tl.load(rows_T + token)
        head_H = (block - Q_BLOCKS) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
        present_H = head_H < tl.where(row >= 0, KEY_HEADS, 0)
        source_H = k_TGD + token * k_stride_t + head_H * k_stride_h
        target_H = kv_RGC + row * row_stride + head_H * head_stride
        _rotate_heads(
            *(source_H, k_stride_d, target_H, present_H, cos_P, sin_P),
            *(WIDTH, PAIRS, BLOCK_PAIRS, BLOCK_REST),
        )
        column_D = tl.arange(0, BLOCK_WIDTH)
        inside_HD = present_H[:, None] & (column_D < WIDTH)[None, :]
        source_H = v_TGD + token * v_stride_t + head_H * v_stride_h
        v_HD = tl.load(source_H[:, None] + column_D[None, :] * v_stride_d, mask=inside_HD)
        tl.store(target_H[:, None] + WIDTH + column_D[None, :], v_HD, mask=inside_HD)


@triton.jit
def _rotate_heads(
    source_H,
    stride,
    target_H,
    present_H,
    cos_P,
    sin_P,
    WIDTH: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """Heads by RoPE, from `source_H` to `target_H`; dims beyond its pairs as they are."""
    pair_P = tl.arange(0, BLOCK_PAIRS)
    inside_HP = present_H[:, None] & (pair_P < PAIRS)[None, :]
    first_HP = tl.load(source_H[:, None] + pair_P[None, :] * stride, mask=inside_HP, other=0.0)
    second_HP = tl.load(source_H[:, None] + (PAIRS + pair_P)[None, :] * stride, mask=inside_HP, other=0.0)
    left_HP, right_HP = _rotate(first_HP, second_HP, cos_P[None, :], sin_P[None, :])
    tl.store(target_H[:, None] + pair_P[None, :], left_HP, mask=inside_HP)
    tl.store(target_H[:, None] + PAIRS + pair_P[None, :], right_HP, mask=inside_HP)
    if BLOCK_REST > 0:
        column_D = 2 * PAIRS + tl.arange(0, BLOCK_REST)
        inside_HD = present_H[:, None] & (column_D < WIDTH)[None, :]
        rest_HD = tl.load(source_H[:, None] + column_D[None, :] * stride, mask=inside_HD)
        tl.store(target_H[:, None] + column_D[None, :], rest_HD, mask=inside_HD)


@triton.jit
def _rotate(first, second, cos, sin):
    """Both halves, rotated: float32 of values that the dtype of `first` has, to which every step rounds."""
    left = _product_of(first, cos) - _product_of(second, sin)
    right = _product_of(second, cos) + _product_of(first, sin)
    return _rounded(left, first.dtype), _rounded(right, first.dtype)


@triton.jit
def _product_of(a, b):
    return _rounded(a.to(tl.float32) * b.to(tl.float32), a.dtype)


@triton.jit
def _rounded(x, DTYPE: tl.constexpr):
    """float32, rounded to what DTYPE has. To bfloat16 by integers, as the interpreter would cut off."""
    if tl.bfloat16 == DTYPE:
        bits = x.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return tl.where(x == x, nearest.to(tl.float32, bitcast=True), x)
    return x.to(DTYPE).to(tl.float32)


@triton.jit
def _paged_index_kernel(
    q_TJE,
    k_TIE,
    out_TJE,
    packed_RX,
    rows_T,
    pairs_IP,
    cos_TP,
    sin_TP,
    cos_stride,
    sin_stride,
    q_stride_t,
    q_stride_j,
    q_stride_e,
    k_stride_t,
    k_stride_i,
    k_stride_e,
    packed_stride,
    HAS_QUERIES: tl.constexpr,
    SHARED: tl.constexpr,
    WIDTH: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    token, key_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column_P = tl.arange(0, BLOCK_HALF)
    inside_P = column_P < WIDTH // 2
    pair_P = tl.load(pairs_IP + key_head * (WIDTH // 2) + column_P, mask=inside_P, other=0)
    # The pair after the last one does not turn.
    turns_P = inside_P & (pair_P < PAIRS)
    cos_P = tl.load(cos_TP + token * cos_stride + pair_P, mask=turns_P, other=1.0)
    sin_P = tl.load(sin_TP + token * sin_stride + pair_P, mask=turns_P, other=0.0)
    if HAS_QUERIES:
        shared_H = tl.arange(0, BLOCK_HEADS)
        head_H = key_head * SHARED + shared_H
        inside_HP = (shared_H < SHARED)[:, None] & inside_P[None, :]
        source_HP = q_TJE + token * q_stride_t + head_H[:, None] * q_stride_j + column_P[None, :] * q_stride_e
        first_HP = tl.load(source_HP, mask=inside_HP, other=0.0)
        second_HP = tl.load(source_HP + WIDTH // 2 * q_stride_e, mask=inside_HP, other=0.0)
        left_HP, right_HP = _rotate(first_HP, second_HP, cos_P[None, :], sin_P[None, :])
        heads = tl.num_programs(1) * SHARED
        target_HP = out_TJE + (token * heads + head_H)[:, None] * WIDTH + column_P[None, :]
        tl.store(target_HP, left_HP, mask=inside_HP)
        tl.store(target_HP + WIDTH // 2, right_HP, mask=inside_HP)
    row = tl.load(rows_T + token)
    source_P = k_TIE + token * k_stride_t + key_head * k_stride_i + column_P * k_stride_e
    first_P = tl.load(source_P, mask=inside_P, other=0.0)
    second_P = tl.load(source_P + WIDTH // 2 * k_stride_e, mask=inside_P, other=0.0)
    left_P, right_P = _rotate(first_P, second_P, cos_P, sin_P)
    if row >= 0:
        target = packed_RX + row * packed_stride + key_head * (WIDTH + 2)
        scale_bits = _scale_bits(left_P, right_P)
        scale = (scale_bits << 16).to(tl.float32, bitcast=True)
        tl.store(target + column_P, _codes(left_P, scale), mask=inside_P)
        tl.store(target + WIDTH // 2 + column_P, _codes(right_P, scale), mask=inside_P)
        # Byte by byte: a row may begin anywhere.
        tl.store(target + WIDTH, (scale_bits & 0xFF).to(tl.int8))
        tl.store(target + WIDTH + 1, (scale_bits >> 8).to(tl.int8))


@triton.jit
def _scale_bits(left_P, right_P):
    """The least bfloat16 that is not below a 127th of the largest number, as int32."""
    is_nan = tl.max(((left_P != left_P) | (right_P != right_P)).to(tl.int32), 0) > 0
    peak = tl.max(tl.maximum(tl.abs(left_P), tl.abs(right_P)), 0)
    exact_bits = tl.div_rn(peak, KERNEL_INT8_MOST).to(tl.int32, bitcast=True)
    return tl.where(is_nan, 0x7FC0, (exact_bits + 0xFFFF) >> 16)


@triton.jit
def _codes(x_P, scale):
    """int8; what is not finite has none: its scale marks the key."""
    code_P = tl.div_rn(x_P, tl.where(scale == 0, 1.0, scale))
    code_P = tl.where(tl.abs(code_P) <= KERNEL_INT8_MOST + 1, code_P, 0.0)
    code_P = (code_P + ROUNDER) - ROUNDER
    return tl.clamp(code_P, -KERNEL_INT8_MOST, KERNEL_INT8_MOST).to(tl.int8)
