"""The target of the indexer's loss by Triton kernels: attention to each query's keys, mean over heads."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fulmen.ops.cpp.library import row_major
from fulmen.ops.losses.indexer.triton_tiles import (
    Chunk,
    LossKeys,
    grid_of_tiles,
    inside_tile,
    keys_of,
    pair_tiles,
    pairs_of,
    place_in_chunk,
    within,
)
from fulmen.ops.triton_kit import (
    KERNEL_LOG2_E,
    launch,
    load_rows,
    product,
    tanh_of,
)

LOWEST = tl.constexpr(-3.0e38)


def attention_lse(
    q_BTHD: Tensor, k_BSGD: Tensor, keys: LossKeys, scale: float, softcap: float | None
) -> Tensor:
    """lse_BTH of the attention over each query's keys, -inf where it has none; sinks left out."""
    batch, queries, heads = q_BTHD.shape[:3]
    lse_BTH = torch.empty(batch, queries, heads, dtype=torch.float32, device=q_BTHD.device)
    tiles = pair_tiles("loss_lse", q_BTHD, k_BSGD, keys)
    head_blocks = k_BSGD.shape[2] * tiles["HEAD_BLOCKS"]
    k_BSGD = row_major(k_BSGD)
    launch(
        _attention_lse_kernel,
        (triton.cdiv(queries, tiles["BLOCK_QUERIES"]), batch * head_blocks),
        *(q_BTHD.contiguous(), k_BSGD, *keys.pointers(), lse_BTH, *k_BSGD.stride()[:3]),
        *(queries, keys.columns, scale, softcap or 0.0),
        CAPPED=softcap is not None,
        **tiles,
    )
    return lse_BTH


def mean_attention_of_chunk(
    q_BTHD: Tensor,
    k_BSGD: Tensor,
    offset_BTH: Tensor,
    keys: LossKeys,
    chunk: Chunk,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """p_BRC: sum over heads of exp(logit - offset), the offset being the lse less the head's log weight.

    Not written where column c is not start <= c < stop.
    """
    batch, queries = q_BTHD.shape[:2]
    tiles = pair_tiles("loss", q_BTHD, k_BSGD, keys)
    p_BRC = torch.empty(batch, chunk.last - chunk.first, keys.columns, device=q_BTHD.device)
    k_BSGD = row_major(k_BSGD)
    launch(
        _mean_attention_kernel,
        grid_of_tiles(p_BRC, tiles),
        *(q_BTHD.contiguous(), k_BSGD, *keys.pointers(), offset_BTH, p_BRC, *k_BSGD.stride()[:3]),
        *(*chunk, queries, keys.columns, scale, softcap or 0.0),
        CAPPED=softcap is not None,
        **tiles,
    )
    return p_BRC


@triton.jit
def _attention_lse_kernel(
    q_BTHD,
    k_BSGD,
    topk_BTK,
    start_BT,
    stop_BT,
    lse_BTH,
    k_stride_b,
    k_stride_s,
    k_stride_g,
    n_queries,
    n_columns,
    scale,
    softcap,
    CAPPED: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    SHARED: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    HEAD_BLOCKS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_FIRST: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    SELECTED: tl.constexpr,
    DTYPE: tl.constexpr,
):
    batch = (tl.program_id(1) // (KEY_HEADS * HEAD_BLOCKS)).to(tl.int64)
    head_block = tl.program_id(1) % (KEY_HEADS * HEAD_BLOCKS)
    query = tl.program_id(0) * BLOCK_QUERIES
    query_R, row_R, present_R = pairs_of(
        batch,
        query,
        n_queries,
        n_queries,
        head_block,
        KEY_HEADS,
        SHARED,
        BLOCK_QUERIES,
        BLOCK_HEADS,
        HEAD_BLOCKS,
    )
    start_R = tl.load(start_BT + batch * n_queries + query_R, mask=present_R, other=n_columns)
    stop_R = tl.load(stop_BT + batch * n_queries + query_R, mask=present_R, other=0)
    k_base = k_BSGD + batch * k_stride_b + (head_block // HEAD_BLOCKS) * k_stride_g
    # Finite, so that a row whose keys are all hidden so far subtracts no infinity from another.
    peak_R = tl.full([BLOCK_QUERIES * BLOCK_HEADS], LOWEST, tl.float32)
    total_R = tl.zeros([BLOCK_QUERIES * BLOCK_HEADS], tl.float32)
    first = tl.min(start_R, 0) // BLOCK_KEYS * BLOCK_KEYS
    for low in range(first, tl.max(stop_R, 0), BLOCK_KEYS):
        column_K = low + tl.arange(0, BLOCK_KEYS)
        key_K, there_K = keys_of(topk_BTK, batch * n_queries + query, low, n_columns, BLOCK_KEYS, SELECTED)
        logits_RK = attention_logits(
            q_BTHD,
            row_R,
            present_R,
            k_base,
            key_K * k_stride_s,
            there_K,
            scale,
            softcap,
            CAPPED,
            WIDTH,
            BLOCK_FIRST,
            BLOCK_REST,
            DTYPE,
        )
        visible_RK = within(column_K, start_R, stop_R) & there_K[None, :]
        logits_RK = tl.where(visible_RK, logits_RK * KERNEL_LOG2_E, float("-inf"))
        higher_R = tl.maximum(peak_R, tl.max(logits_RK, 1))
        total_R = total_R * tl.exp2(peak_R - higher_R) + tl.sum(tl.exp2(logits_RK - higher_R[:, None]), 1)
        peak_R = higher_R
    lse_R = (peak_R + tl.log2(tl.where(total_R == 0, 1.0, total_R))) / KERNEL_LOG2_E
    tl.store(lse_BTH + row_R, tl.where(total_R == 0, float("-inf"), lse_R), mask=present_R)


@triton.jit
def _mean_attention_kernel(
    q_BTHD,
    k_BSGD,
    topk_BTK,
    start_BT,
    stop_BT,
    offset_BTH,
    p_BRC,
    k_stride_b,
    k_stride_s,
    k_stride_g,
    first_query,
    last_query,
    n_queries,
    n_columns,
    scale,
    softcap,
    CAPPED: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    SHARED: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    HEAD_BLOCKS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_FIRST: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    SELECTED: tl.constexpr,
    DTYPE: tl.constexpr,
):
    batch = tl.program_id(2).to(tl.int64)
    query, low = first_query + tl.program_id(0) * BLOCK_QUERIES, tl.program_id(1) * BLOCK_KEYS
    inside_TK = inside_tile(
        start_BT, stop_BT, batch * n_queries, query, last_query, low, BLOCK_QUERIES, BLOCK_KEYS
    )
    if tl.max(tl.max(inside_TK.to(tl.int32), 1), 0) == 0:
        return
    key_K, there_K = keys_of(topk_BTK, batch * n_queries + query, low, n_columns, BLOCK_KEYS, SELECTED)
    p_TK = tl.zeros([BLOCK_QUERIES, BLOCK_KEYS], tl.float32)
    for head_block in range(KEY_HEADS * HEAD_BLOCKS):
        _, row_R, present_R = pairs_of(
            batch,
            query,
            last_query,
            n_queries,
            head_block,
            KEY_HEADS,
            SHARED,
            BLOCK_QUERIES,
            BLOCK_HEADS,
            HEAD_BLOCKS,
        )
        k_base = k_BSGD + batch * k_stride_b + (head_block // HEAD_BLOCKS) * k_stride_g
        logits_RK = attention_logits(
            q_BTHD,
            row_R,
            present_R,
            k_base,
            key_K * k_stride_s,
            there_K,
            scale,
            softcap,
            CAPPED,
            WIDTH,
            BLOCK_FIRST,
            BLOCK_REST,
            DTYPE,
        )
        offset_R = tl.load(offset_BTH + row_R, mask=present_R, other=0.0)
        p_RK = tl.exp2((logits_RK - offset_R[:, None]) * KERNEL_LOG2_E)
        # A pair that is not there has a query of 0, but a key may be no number.
        p_RK = tl.where(present_R[:, None], p_RK, 0.0)
        p_TK += tl.sum(tl.reshape(p_RK, [BLOCK_QUERIES, BLOCK_HEADS, BLOCK_KEYS]), 1)
    p_TK = tl.where(there_K[None, :], p_TK, 0.0)
    index_TK = place_in_chunk(
        batch, query, low, first_query, last_query, n_columns, BLOCK_QUERIES, BLOCK_KEYS
    )
    tl.store(p_BRC + index_TK, p_TK, mask=inside_TK)


@triton.jit
def attention_logits(
    q_BTHD,
    row_R,
    present_R,
    k_base,
    key_offset_K,
    there_K,
    scale,
    softcap,
    CAPPED: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_FIRST: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """`[R, K]`: scale * q.k of pairs and keys of one key head, capped."""
    q_RD = load_rows(q_BTHD, row_R * WIDTH, present_R, 0, WIDTH, BLOCK_FIRST, DTYPE)
    k_KD = load_rows(k_base, key_offset_K, there_K, 0, WIDTH, BLOCK_FIRST, DTYPE)
    logits_RK = product(q_RD, tl.trans(k_KD))
    if BLOCK_REST > 0:
        q_RX = load_rows(q_BTHD, row_R * WIDTH, present_R, BLOCK_FIRST, WIDTH, BLOCK_REST, DTYPE)
        k_KX = load_rows(k_base, key_offset_K, there_K, BLOCK_FIRST, WIDTH, BLOCK_REST, DTYPE)
        logits_RK += product(q_RX, tl.trans(k_KX))
    logits_RK *= scale
    if CAPPED:
        logits_RK = tanh_of(logits_RK / softcap) * softcap
    return logits_RK
