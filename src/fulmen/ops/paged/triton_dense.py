"""Attention of prompts' queries that keep all their keys, over the paged cache where it lies.

Neighbouring queries read the same keys: a tile has several, with all heads of a key head.
"""

import triton
import triton.language as tl
from torch import Tensor

from fulmen.ops.paged.layer import PagedLayer
from fulmen.ops.paged.requests import Requests
from fulmen.ops.paged.triton_attend import LOWEST, attend_tiles, attend_to, share_of, sinks_of, softmax_of
from fulmen.ops.paged.triton_blocks import request_of, requests_held, rows_of, tiles_of
from fulmen.ops.triton_kit import kernel_sizes, launch, load_rows, power_of_2


def launch_paged_dense(layer: PagedLayer, requests: Requests, q_THD: Tensor, out_THD: Tensor) -> None:
    """Write the attention of the queries that keep all of their keys, and of no others.

    Args:
        q_THD: contiguous, rotated.
    """
    shared = layer.n_heads // layer.kv_RGC.shape[1]
    block_queries = max(kernel_sizes("paged_dense")["rows"] // power_of_2(shared), 1)
    tiles = attend_tiles("paged_dense", layer, block_queries)
    _, n_tiles = tiles_of(0, len(q_THD), requests.count, block_queries)
    launch(
        *(_paged_dense_kernel, (n_tiles, layer.kv_RGC.shape[1] * tiles["HEAD_BLOCKS"]), q_THD, layer.kv_RGC),
        *(requests.block_BN, requests.start_Z, requests.length_B, sinks_of(layer, q_THD), out_THD),
        *(*layer.kv_RGC.stride()[:2], requests.block_BN.stride(0), requests.rows_per_block, requests.count),
        *(max(layer.topk, layer.dense_up_to), layer.scale, layer.softcap or 0.0),
        PAGE=requests.block_size,
        BLOCK_REQUESTS=requests_held(requests.count),
        BLOCK_QUERIES=block_queries,
        **tiles,
    )


@triton.jit(do_not_specialize=["n_requests", "all_up_to"])
def _paged_dense_kernel(
    q_THD,
    kv_RGC,
    block_BN,
    start_Z,
    length_B,
    sinks_H,
    out_THD,
    row_stride,
    head_stride,
    block_stride,
    rows_per_block,
    n_requests,
    all_up_to,
    scale,
    softcap,
    PAGE: tl.constexpr,
    BLOCK_REQUESTS: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
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
    key_head = tl.program_id(1) // HEAD_BLOCKS
    request, token, n_left, stop = request_of(
        start_Z, length_B, tl.program_id(0), n_requests, BLOCK_QUERIES, BLOCK_REQUESTS
    )
    # R: pairs of a query and one of the heads that share a key head
    pair_R = tl.arange(0, BLOCK_QUERIES * BLOCK_HEADS)
    query_R = pair_R // BLOCK_HEADS
    shared_R = tl.program_id(1) % HEAD_BLOCKS * BLOCK_HEADS + pair_R % BLOCK_HEADS
    present_R = (query_R < n_left) & (stop + query_R <= all_up_to) & (shared_R < SHARED)
    stop_R = tl.where(present_R, stop + query_R, 0)
    n_seen = tl.max(stop_R, 0)
    if n_seen > 0:
        head_R = (token + query_R).to(tl.int64) * (KEY_HEADS * SHARED) + key_head * SHARED + shared_R
        q_RD = load_rows(q_THD, head_R * WIDTH, present_R, 0, WIDTH, BLOCK_WIDTH, DTYPE)
        peak_R = tl.full([BLOCK_QUERIES * BLOCK_HEADS], LOWEST, tl.float32)
        total_R = tl.zeros([BLOCK_QUERIES * BLOCK_HEADS], tl.float32)
        sum_RD = tl.zeros([BLOCK_QUERIES * BLOCK_HEADS, BLOCK_WIDTH], tl.float32)
        for low in range(0, n_seen, BLOCK_KEYS):
            key_K = low + tl.arange(0, BLOCK_KEYS)
            present_K = key_K < n_seen
            row_K = rows_of(block_BN + request * block_stride, key_K, present_K, rows_per_block, PAGE)
            offset_K = row_K * row_stride + key_head * head_stride
            present_RK = key_K[None, :] < stop_R[:, None]
            peak_R, total_R, sum_RD = attend_to(
                *(q_RD, kv_RGC, offset_K, present_K, present_RK, peak_R, total_R, sum_RD, scale, softcap),
                *(CAPPED, WIDTH, BLOCK_WIDTH, DTYPE),
            )
        out_RD, lse_R = softmax_of(peak_R, total_R, sum_RD, present_R)
        if HAS_SINKS:
            out_RD *= share_of(lse_R, sinks_H + key_head * SHARED + shared_R, present_R)[:, None]
        column_D = tl.arange(0, BLOCK_WIDTH)
        inside_RD = present_R[:, None] & (column_D < WIDTH)[None, :]
        tl.store(out_THD + head_R[:, None] * WIDTH + column_D[None, :], out_RD, mask=inside_RD)
