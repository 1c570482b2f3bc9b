"""Attention whose keys have gates, and the gradients of the gates, by Triton kernels.

A gate is sigmoid((I - cut) / temperature), its logarithm is added to the logits of all heads.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fulmen.ops.cpp.library import row_major
from fulmen.ops.losses.indexer.triton_backward import finite_or_zero
from fulmen.ops.losses.indexer.triton_target import LOWEST, attention_logits
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
from fulmen.ops.triton_kit import KERNEL_LOG2_E, SMALLEST_PRODUCT, launch, load_rows, power_of_2, product


class Gates(NamedTuple):
    """Of a chunk of queries: index scores, where a gate is half open, and how wide that is."""

    scores_BRC: Tensor
    cut_BR: Tensor
    temperature: float


def attend_with_gates(
    q_BTHD: Tensor,
    k_BSGD: Tensor,
    v_BSGV: Tensor,
    keys: LossKeys,
    chunk: Chunk,
    gates: Gates,
    scale: float,
    softcap: float | None,
    out_BTHV: Tensor,
    lse_BTH: Tensor,
) -> None:
    """Write the rows of the chunk's queries: output, 0 without keys, and log-sum-exp, there -inf."""
    batch, queries = q_BTHD.shape[:2]
    tiles = _gate_tiles(q_BTHD, k_BSGD, v_BSGV, keys)
    head_blocks = k_BSGD.shape[2] * tiles["HEAD_BLOCKS"]
    k_BSGD, v_BSGV = row_major(k_BSGD), row_major(v_BSGV)
    launch(
        _gated_attention_kernel,
        (triton.cdiv(chunk.last - chunk.first, tiles["BLOCK_QUERIES"]), batch * head_blocks),
        *(q_BTHD.contiguous(), k_BSGD, v_BSGV, keys.start_BT, keys.stop_BT, gates.scores_BRC, gates.cut_BR),
        *(out_BTHV, lse_BTH, *k_BSGD.stride()[:3], *v_BSGV.stride()[:3]),
        *(*chunk, queries, keys.columns, scale, softcap or 0.0, gates.temperature),
        CAPPED=softcap is not None,
        **tiles,
    )


def gate_gradients(
    q_BTHD: Tensor,
    k_BSGD: Tensor,
    v_BSGV: Tensor,
    dout_BTHV: Tensor,
    lse_BTH: Tensor,
    delta_BTH: Tensor,
    keys: LossKeys,
    chunk: Chunk,
    gates: Gates,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """dgates_BRC: of the log gates. Not written where column c is not start <= c < stop."""
    queries, tiles = q_BTHD.shape[1], _gate_tiles(q_BTHD, k_BSGD, v_BSGV, keys)
    dgates_BRC = torch.empty_like(gates.scores_BRC)
    k_BSGD, v_BSGV = row_major(k_BSGD), row_major(v_BSGV)
    launch(
        _gate_gradients_kernel,
        grid_of_tiles(dgates_BRC, tiles),
        *(q_BTHD.contiguous(), k_BSGD, v_BSGV, keys.start_BT, keys.stop_BT, gates.scores_BRC, gates.cut_BR),
        *(dout_BTHV, lse_BTH, delta_BTH, dgates_BRC, *k_BSGD.stride()[:3], *v_BSGV.stride()[:3]),
        *(*chunk, queries, keys.columns, scale, softcap or 0.0, gates.temperature),
        CAPPED=softcap is not None,
        **tiles,
    )
    return dgates_BRC


def _gate_tiles(q_BTHD: Tensor, k_BSGD: Tensor, v_BSGV: Tensor, keys: LossKeys) -> dict[str, Any]:
    tiles = pair_tiles("loss_gates", q_BTHD, k_BSGD, keys)
    del tiles["SELECTED"]
    width = v_BSGV.shape[3]
    return {**tiles, "VALUE_WIDTH": width, "BLOCK_VALUE": power_of_2(width, SMALLEST_PRODUCT)}


@triton.jit
def _gated_attention_kernel(
    q_BTHD,
    k_BSGD,
    v_BSGV,
    start_BT,
    stop_BT,
    scores_BRC,
    cut_BR,
    out_BTHV,
    lse_BTH,
    k_stride_b,
    k_stride_s,
    k_stride_g,
    v_stride_b,
    v_stride_s,
    v_stride_g,
    first_query,
    last_query,
    n_queries,
    n_columns,
    scale,
    softcap,
    temperature,
    CAPPED: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    SHARED: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    HEAD_BLOCKS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_FIRST: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    DTYPE: tl.constexpr,
):
    batch = (tl.program_id(1) // (KEY_HEADS * HEAD_BLOCKS)).to(tl.int64)
    head_block = tl.program_id(1) % (KEY_HEADS * HEAD_BLOCKS)
    query = first_query + tl.program_id(0) * BLOCK_QUERIES
    query_R, row_R, present_R = pairs_of(
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
    start_R = tl.load(start_BT + batch * n_queries + query_R, mask=present_R, other=n_columns)
    stop_R = tl.load(stop_BT + batch * n_queries + query_R, mask=present_R, other=0)
    chunk_row_R = batch * (last_query - first_query) + query_R - first_query
    cut_R = tl.load(cut_BR + chunk_row_R, mask=present_R, other=0.0)
    k_base = k_BSGD + batch * k_stride_b + (head_block // HEAD_BLOCKS) * k_stride_g
    v_base = v_BSGV + batch * v_stride_b + (head_block // HEAD_BLOCKS) * v_stride_g
    # Finite, so that a row whose keys are all hidden so far subtracts no infinity from another.
    peak_R = tl.full([BLOCK_QUERIES * BLOCK_HEADS], LOWEST, tl.float32)
    total_R = tl.zeros([BLOCK_QUERIES * BLOCK_HEADS], tl.float32)
    sum_RV = tl.zeros([BLOCK_QUERIES * BLOCK_HEADS, BLOCK_VALUE], tl.float32)
    first = tl.min(start_R, 0) // BLOCK_KEYS * BLOCK_KEYS
    for low in range(first, tl.max(stop_R, 0), BLOCK_KEYS):
        column_K = low + tl.arange(0, BLOCK_KEYS)
        key_K, there_K = keys_of(start_BT, 0, low, n_columns, BLOCK_KEYS, False)
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
        visible_RK = within(column_K, start_R, stop_R)
        place_RK = chunk_row_R[:, None] * n_columns + column_K[None, :]
        score_RK = tl.load(scores_BRC + place_RK, mask=visible_RK, other=0.0)
        v_KV = load_rows(v_base, key_K * v_stride_s, there_K, 0, VALUE_WIDTH, BLOCK_VALUE, DTYPE)
        # A value that is no number makes NaN of the queries that see it, by their logits, and of no others.
        logits_RK += tl.sum(v_KV.to(tl.float32) * 0.0, 1)[None, :] + log_gates(score_RK, cut_R, temperature)
        logits_RK = tl.where(visible_RK, logits_RK * KERNEL_LOG2_E, float("-inf"))
        higher_R = tl.maximum(peak_R, tl.max(logits_RK, 1))
        fade_R = tl.exp2(peak_R - higher_R)
        weights_RK = tl.exp2(logits_RK - higher_R[:, None])
        total_R = total_R * fade_R + tl.sum(weights_RK, 1)
        sum_RV = sum_RV * fade_R[:, None] + product(weights_RK.to(DTYPE), finite_or_zero(v_KV))
        peak_R = higher_R
    value_V = tl.arange(0, BLOCK_VALUE)
    divisor_R = tl.where(total_R == 0, 1.0, total_R)
    inside_RV = present_R[:, None] & (value_V < VALUE_WIDTH)[None, :]
    out_RV = sum_RV / divisor_R[:, None]
    tl.store(out_BTHV + row_R[:, None] * VALUE_WIDTH + value_V[None, :], out_RV, mask=inside_RV)
    lse_R = tl.where(total_R == 0, float("-inf"), (peak_R + tl.log2(divisor_R)) / KERNEL_LOG2_E)
    tl.store(lse_BTH + row_R, lse_R, mask=present_R)


@triton.jit
def _gate_gradients_kernel(
    q_BTHD,
    k_BSGD,
    v_BSGV,
    start_BT,
    stop_BT,
    scores_BRC,
    cut_BR,
    dout_BTHV,
    lse_BTH,
    delta_BTH,
    dgates_BRC,
    k_stride_b,
    k_stride_s,
    k_stride_g,
    v_stride_b,
    v_stride_s,
    v_stride_g,
    first_query,
    last_query,
    n_queries,
    n_columns,
    scale,
    softcap,
    temperature,
    CAPPED: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    SHARED: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    HEAD_BLOCKS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_FIRST: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    DTYPE: tl.constexpr,
):
    batch = tl.program_id(2).to(tl.int64)
    query, low = first_query + tl.program_id(0) * BLOCK_QUERIES, tl.program_id(1) * BLOCK_KEYS
    inside_TK = inside_tile(
        start_BT, stop_BT, batch * n_queries, query, last_query, low, BLOCK_QUERIES, BLOCK_KEYS
    )
    if tl.max(tl.max(inside_TK.to(tl.int32), 1), 0) == 0:
        return
    key_K, there_K = keys_of(start_BT, 0, low, n_columns, BLOCK_KEYS, False)
    index_TK = place_in_chunk(
        batch, query, low, first_query, last_query, n_columns, BLOCK_QUERIES, BLOCK_KEYS
    )
    query_T = query + tl.arange(0, BLOCK_QUERIES)
    chunk_row_T = batch * (last_query - first_query) + query_T - first_query
    cut_T = tl.load(cut_BR + chunk_row_T, mask=query_T < last_query, other=0.0)
    score_TK = tl.load(scores_BRC + index_TK, mask=inside_TK, other=0.0)
    gate_TK = log_gates(score_TK, cut_T, temperature)
    gate_TXK = tl.broadcast_to(gate_TK[:, None, :], [BLOCK_QUERIES, BLOCK_HEADS, BLOCK_KEYS])
    gate_RK = tl.reshape(gate_TXK, [BLOCK_QUERIES * BLOCK_HEADS, BLOCK_KEYS])
    dgates_TK = tl.zeros([BLOCK_QUERIES, BLOCK_KEYS], tl.float32)
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
        v_base = v_BSGV + batch * v_stride_b + (head_block // HEAD_BLOCKS) * v_stride_g
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
        lse_R = tl.load(lse_BTH + row_R, mask=present_R, other=0.0)
        delta_R = tl.load(delta_BTH + row_R, mask=present_R, other=0.0)
        dout_RV = load_rows(dout_BTHV, row_R * VALUE_WIDTH, present_R, 0, VALUE_WIDTH, BLOCK_VALUE, DTYPE)
        v_KV = load_rows(v_base, key_K * v_stride_s, there_K, 0, VALUE_WIDTH, BLOCK_VALUE, DTYPE)
        probs_RK = tl.exp2((logits_RK + gate_RK - lse_R[:, None]) * KERNEL_LOG2_E)
        dgates_RK = probs_RK * (product(dout_RV, tl.trans(v_KV)) - delta_R[:, None])
        dgates_RK = tl.where(present_R[:, None], dgates_RK, 0.0)
        dgates_TK += tl.sum(tl.reshape(dgates_RK, [BLOCK_QUERIES, BLOCK_HEADS, BLOCK_KEYS]), 1)
    tl.store(dgates_BRC + index_TK, dgates_TK, mask=inside_TK)


@triton.jit
def log_gates(score_RK, cut_R, temperature):
    """log sigmoid((score - cut) / temperature); 0 where the cut is -inf."""
    distance_RK = (score_RK - cut_R[:, None]) / temperature
    closed_RK = tl.log2(1.0 + tl.exp2(-tl.abs(distance_RK) * KERNEL_LOG2_E)) / KERNEL_LOG2_E
    return tl.minimum(distance_RK, 0.0) - closed_RK
