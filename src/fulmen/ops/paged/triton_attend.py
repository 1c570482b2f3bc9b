"""Attention over rows of a paged cache, where they lie: each query over the keys that it keeps.

All heads of a key head are the rows of one tile. For few queries a request (decoding) what a query keeps is
cut into parts that are attended to side by side and then merged; how depends on the most that any query
keeps, so that a request has the same bits alone and in a batch.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fulmen.ops.paged.layer import PagedLayer
from fulmen.ops.paged.requests import Requests
from fulmen.ops.paged.triton_blocks import request_of, requests_held, rows_of
from fulmen.ops.triton_kit import (
    KERNEL_LOG2_E,
    SMALLEST_PRODUCT,
    compile_options,
    kernel_sizes,
    launch,
    load_rows,
    power_of_2,
    product,
    product_dtype,
    tanh_of,
)

LOWEST = tl.constexpr(-3.0e38)
# Up to so many queries a request, what a query keeps is cut into parts of so many keys.
FEW_QUERIES = 8
PART_KEYS = 256
# Heads wider than this take smaller tiles.
WIDE_PAGED_HEAD = 128


def launch_paged_attend(
    layer: PagedLayer, requests: Requests, q_THD: Tensor, chosen_TK: Tensor | None, out_THD: Tensor
) -> None:
    """Write the attention of each query over what it keeps, and 0 for padding.

    Args:
        q_THD: contiguous, rotated. chosen_TK: int32, the keys of queries that see more than they all keep;
            None: no query does.
    Of many queries a request, those that keep all keys are left to `launch_paged_dense`.
    """
    count, heads, _ = q_THD.shape
    all_up_to = max(layer.topk, layer.dense_up_to)
    few = requests.most_queries <= FEW_QUERIES
    n_parts = triton.cdiv(all_up_to, PART_KEYS) if few else 1
    out_NTHD, lse_NTH = out_THD[None], q_THD.new_empty(n_parts, count, heads, dtype=torch.float32)
    if n_parts > 1:
        out_NTHD = torch.empty(n_parts, *q_THD.shape, dtype=torch.float32, device=q_THD.device)
    tiles, n_tiles = attend_tiles("paged_attend", layer, 1), count + requests.count
    launch(
        *(_paged_attend_kernel, (n_tiles, _head_tiles(layer, tiles), n_parts), q_THD, layer.kv_RGC),
        *(requests.block_BN, requests.start_Z, requests.length_B),
        *(requests.block_BN if chosen_TK is None else chosen_TK, sinks_of(layer, q_THD), out_NTHD, lse_NTH),
        *(*layer.kv_RGC.stride()[:2], requests.block_BN.stride(0), requests.rows_per_block, requests.count),
        *(count, layer.topk, all_up_to, PART_KEYS if few else all_up_to),
        *(layer.scale, layer.softcap or 0.0),
        SOME_SELECT=chosen_TK is not None,
        ALL_ELSEWHERE=not few,
        IN_PARTS=n_parts > 1,
        PAGE=requests.block_size,
        BLOCK_REQUESTS=requests_held(requests.count),
        **tiles,
    )
    if n_parts > 1:
        _merge_parts(layer, out_NTHD, lse_NTH, out_THD)


def part_bytes(out_THD: Tensor, all_up_to: int) -> int:
    """What parts take until they are merged, if `out_THD` is of few queries a request."""
    return triton.cdiv(all_up_to, PART_KEYS) * out_THD[..., 0].numel() * 4 * (out_THD.shape[2] + 1)


def _merge_parts(layer: PagedLayer, out_NTHD: Tensor, lse_NTH: Tensor, out_THD: Tensor) -> None:
    launch(
        *(_paged_merge_kernel, (lse_NTH[0].numel(),), out_NTHD, lse_NTH, sinks_of(layer, out_THD), out_THD),
        *(lse_NTH[0].numel(), len(lse_NTH)),
        HAS_SINKS=layer.sinks_H is not None,
        HEADS=out_THD.shape[1],
        WIDTH=out_THD.shape[2],
        BLOCK_PARTS=power_of_2(len(lse_NTH)),
        BLOCK_WIDTH=power_of_2(out_THD.shape[2]),
        **compile_options(kernel_sizes("paged_merge")),
    )


def attend_tiles(name: str, layer: PagedLayer, block_queries: int) -> dict[str, Any]:
    """How a kernel over queries of `layer` is cut and compiled."""
    (heads, width), n_key_heads = layer.shapes["q"], layer.kv_RGC.shape[1]
    sizes = kernel_sizes(name if width <= WIDE_PAGED_HEAD else f"{name}_wide")
    shared = heads // n_key_heads
    block_heads = min(power_of_2(shared, SMALLEST_PRODUCT // block_queries), sizes["rows"] // block_queries)
    return {
        "HAS_SINKS": layer.sinks_H is not None,
        "CAPPED": layer.softcap is not None,
        "KEY_HEADS": n_key_heads,
        "SHARED": shared,
        "WIDTH": width,
        "BLOCK_HEADS": block_heads,
        "HEAD_BLOCKS": triton.cdiv(shared, block_heads),
        "BLOCK_KEYS": sizes["columns"],
        "BLOCK_WIDTH": power_of_2(width, SMALLEST_PRODUCT),
        "DTYPE": product_dtype(layer.kv_RGC),
        **compile_options(sizes),
    }


def _head_tiles(layer: PagedLayer, tiles: dict[str, Any]) -> int:
    return layer.kv_RGC.shape[1] * tiles["HEAD_BLOCKS"]


def sinks_of(layer: PagedLayer, instead: Tensor) -> Tensor:
    """The layer's sinks for a kernel; `instead`, which it does not read, where there are none."""
    return instead if layer.sinks_H is None else layer.sinks_H.detach()


@triton.jit(do_not_specialize=["n_requests", "n_tokens", "topk", "all_up_to", "part_keys"])
def _paged_attend_kernel(
    q_THD,
    kv_RGC,
    block_BN,
    start_Z,
    length_B,
    chosen_TK,
    sinks_H,
    out_NTHD,
    lse_NTH,
    row_stride,
    head_stride,
    block_stride,
    rows_per_block,
    n_requests,
    n_tokens,
    topk,
    all_up_to,
    part_keys,
    scale,
    softcap,
    SOME_SELECT: tl.constexpr,
    ALL_ELSEWHERE: tl.constexpr,
    IN_PARTS: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_REQUESTS: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    CAPPED: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    SHARED: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    HEAD_BLOCKS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    DTYPE: tl.constexpr,
):
    part, key_head = tl.program_id(2), tl.program_id(1) // HEAD_BLOCKS
    request, token, n_left, stop = request_of(
        start_Z, length_B, tl.program_id(0), n_requests, 1, BLOCK_REQUESTS
    )
    # The tiles after those of the last request are of the padding.
    is_padding = tl.program_id(0) - n_requests >= tl.load(start_Z + n_requests)
    token = tl.where(is_padding, tl.program_id(0) - n_requests, token)
    keeps_all = stop <= all_up_to
    n_kept = tl.where(is_padding, 0, tl.where(keeps_all, stop, topk))
    # A tile beyond a request's last token has no heads.
    n_heads = tl.where((n_left > 0) | is_padding, SHARED, 0)
    if ALL_ELSEWHERE:
        n_heads = tl.where(keeps_all & (n_left > 0), 0, n_heads)
    first, last = part * part_keys, tl.minimum((part + 1) * part_keys, n_kept)
    last = tl.where(n_heads > 0, last, 0)
    shared_H = tl.program_id(1) % HEAD_BLOCKS * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    present_H = shared_H < n_heads
    reading_H = shared_H < tl.where(last > first, n_heads, 0)
    head_H = token.to(tl.int64) * (KEY_HEADS * SHARED) + key_head * SHARED + shared_H

    q_HD = load_rows(q_THD, head_H * WIDTH, reading_H, 0, WIDTH, BLOCK_WIDTH, DTYPE)
    peak_H = tl.full([BLOCK_HEADS], LOWEST, tl.float32)
    total_H = tl.zeros([BLOCK_HEADS], tl.float32)
    sum_HD = tl.zeros([BLOCK_HEADS, BLOCK_WIDTH], tl.float32)
    for low in range(first, last, BLOCK_KEYS):
        entry_K = low + tl.arange(0, BLOCK_KEYS)
        present_K = entry_K < last
        key_K = entry_K
        if SOME_SELECT:
            chosen_K = chosen_TK + token.to(tl.int64) * topk + entry_K
            n_chosen = tl.where(keeps_all, 0, last)
            chosen_K = tl.load(chosen_K, mask=entry_K < n_chosen, other=0)
            key_K = tl.where(keeps_all, entry_K, chosen_K)
        row_K = rows_of(block_BN + request * block_stride, key_K, present_K, rows_per_block, PAGE)
        peak_H, total_H, sum_HD = attend_to(
            *(q_HD, kv_RGC, row_K * row_stride + key_head * head_stride, present_K),
            *(reading_H[:, None] & present_K[None, :], peak_H, total_H, sum_HD, scale, softcap),
            *(CAPPED, WIDTH, BLOCK_WIDTH, DTYPE),
        )

    out_HD, lse_H = softmax_of(peak_H, total_H, sum_HD, reading_H)
    place_H = part.to(tl.int64) * n_tokens * (KEY_HEADS * SHARED) + head_H
    if IN_PARTS:
        tl.store(lse_NTH + place_H, lse_H, mask=present_H)
        # A part without keys has nothing more to say.
        present_H = reading_H
    elif HAS_SINKS:
        out_HD *= share_of(lse_H, sinks_H + key_head * SHARED + shared_H, present_H)[:, None]
    column_D = tl.arange(0, BLOCK_WIDTH)
    inside_HD = present_H[:, None] & (column_D < WIDTH)[None, :]
    tl.store(out_NTHD + place_H[:, None] * WIDTH + column_D[None, :], out_HD, mask=inside_HD)


@triton.jit
def attend_to(
    q_RD,
    kv_RGC,
    offset_K,
    present_K,
    present_RK,
    peak_R,
    total_R,
    sum_RD,
    scale,
    softcap,
    CAPPED: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """One tile of keys more: the highest logit (by log2 e) so far, the sums of weights and of values."""
    k_KD = load_rows(kv_RGC, offset_K, present_K, 0, WIDTH, BLOCK_WIDTH, DTYPE)
    logits_RK = product(q_RD, tl.trans(k_KD))
    if CAPPED:
        logits_RK = tanh_of(logits_RK * (scale / softcap)) * (softcap * KERNEL_LOG2_E)
    else:
        logits_RK *= scale * KERNEL_LOG2_E
    logits_RK = tl.where(present_RK, logits_RK, float("-inf"))
    higher_R = tl.maximum(peak_R, tl.max(logits_RK, 1))
    fade_R = tl.exp2(peak_R - higher_R)
    weights_RK = tl.exp2(logits_RK - higher_R[:, None])
    v_KD = load_rows(kv_RGC, offset_K + WIDTH, present_K, 0, WIDTH, BLOCK_WIDTH, DTYPE)
    total_R = total_R * fade_R + tl.sum(weights_RK, 1)
    return higher_R, total_R, sum_RD * fade_R[:, None] + product(weights_RK.to(DTYPE), v_KD)


@triton.jit
def softmax_of(peak_R, total_R, sum_RD, has_keys_R):
    """Output and lse of what was summed; NaN for keys that all have logits of -inf, 0 for no keys."""
    empty_R = total_R == 0
    divisor_R = tl.where(empty_R, 1.0, total_R)
    nothing_R = tl.where(empty_R & has_keys_R, float("nan"), 0.0)
    # Low, but finite: such keys have no part in what others merge to, and are no number among themselves.
    lowest_R = tl.where(empty_R & has_keys_R, LOWEST, float("-inf"))
    lse_R = tl.where(empty_R, lowest_R, (peak_R + tl.log2(divisor_R)) / KERNEL_LOG2_E)
    return tl.where(empty_R[:, None], nothing_R[:, None], sum_RD / divisor_R[:, None]), lse_R


@triton.jit
def share_of(lse_H, sinks_H, present_H):
    """What a sink leaves to the keys."""
    sink_H = tl.load(sinks_H, mask=present_H, other=0.0).to(tl.float32)
    return 1 / (1 + tl.exp2((sink_H - lse_H) * KERNEL_LOG2_E))


@triton.jit
def _paged_merge_kernel(
    out_NRD,
    lse_NR,
    sinks_H,
    out_RD,
    n_rows,
    n_parts,
    HAS_SINKS: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    part_N, column_D = tl.arange(0, BLOCK_PARTS), tl.arange(0, BLOCK_WIDTH)
    place_N = part_N * n_rows + row
    lse_N = tl.load(lse_NR + place_N, mask=part_N < n_parts, other=float("-inf"))
    peak = tl.maximum(tl.max(lse_N, 0), LOWEST)
    weight_N = tl.exp2((lse_N - peak) * KERNEL_LOG2_E)
    total = tl.sum(weight_N, 0)
    divisor = tl.where(total == 0, 1.0, total)
    # Parts without keys have written nothing but that they have none.
    inside_ND = (weight_N != 0)[:, None] & (column_D < WIDTH)[None, :]
    part_ND = tl.load(out_NRD + place_N[:, None] * WIDTH + column_D[None, :], mask=inside_ND, other=0.0)
    merged_D = tl.sum(part_ND * weight_N[:, None], 0) / divisor
    if HAS_SINKS:
        sink = tl.load(sinks_H + row % HEADS).to(tl.float32)
        merged_D *= 1 / (1 + tl.exp2((sink - peak - tl.log2(divisor) / KERNEL_LOG2_E) * KERNEL_LOG2_E))
    tl.store(out_RD + row * WIDTH + column_D, merged_D, mask=column_D < WIDTH)
