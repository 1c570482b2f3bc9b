"""Gradients of the indexer's inputs by Triton kernels, from d loss / d I of a chunk of queries.

One kernel goes over the queries: those of queries, weights and shifts. Those of keys are sums over queries.
Over an interval a program owns a tile of keys and goes over the queries; over a selection it owns one key,
and goes over the queries that selected it, in ascending order. Nothing is added atomically.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fulmen.ops.cpp.library import row_major
from fulmen.ops.losses.indexer.triton_scores import index_queries, weights_of_heads
from fulmen.ops.losses.indexer.triton_tiles import Chunk, LossKeys, keys_of, pair_tiles, pairs_of, within
from fulmen.ops.triton_kit import (
    SMALLEST_PRODUCT,
    compile_options,
    kernel_sizes,
    launch,
    load_rows,
    places_of_keys,
    power_of_2,
    product,
)

IndexInputs = tuple[Tensor, Tensor, Tensor, Tensor | None]


def gradients_to_fill(
    q_BTJE: Tensor, k_BSIE: Tensor, w_BTJ: Tensor, b_BTJ: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Of the same shapes, contiguous; that of the keys zero and in float32, as chunks are added to it."""
    dq_BTJE, dw_BTJ = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q_BTJE, w_BTJ))
    dk_BSIE = torch.zeros(k_BSIE.shape, dtype=torch.float32, device=k_BSIE.device)
    db_BTJ = None if b_BTJ is None else torch.empty(b_BTJ.shape, dtype=b_BTJ.dtype, device=b_BTJ.device)
    return dq_BTJE, dk_BSIE, dw_BTJ, db_BTJ


def fill_gradients(
    dscores_BRC: Tensor, chunk: Chunk, keys: LossKeys, index: IndexInputs, gradients: IndexInputs
) -> None:
    """Write the gradients of the chunk's queries, weights and shifts; add to those of the keys."""
    q_BTJE, k_BSIE, w_BTJ, b_BTJ = index
    weights = weights_of_heads(w_BTJ, b_BTJ)
    inputs = (q_BTJE.contiguous(), row_major(k_BSIE), *weights)
    has_shift = b_BTJ is not None
    _launch_by_query(*inputs, dscores_BRC, chunk, keys, gradients, has_shift)
    if keys.topk_BTK is None:
        _launch_by_key(*inputs, dscores_BRC, chunk, keys, gradients[1], has_shift)
    else:
        topk_BRK = keys.topk_BTK[:, chunk.first : chunk.last]
        _launch_by_selected_key(*inputs, dscores_BRC, chunk, topk_BRK, gradients[1], has_shift)


def _launch_by_query(
    q_BTJE: Tensor,
    k_BSIE: Tensor,
    w_BTJ: Tensor,
    b_BTJ: Tensor,
    dscores_BRC: Tensor,
    chunk: Chunk,
    keys: LossKeys,
    gradients: IndexInputs,
    has_shift: bool,
) -> None:
    batch, queries, _, width = q_BTJE.shape
    tiles = _gradient_tiles(q_BTJE, k_BSIE, keys)
    dq_BTJE, _, dw_BTJ, db_BTJ = gradients
    head_blocks = k_BSIE.shape[2] * tiles["HEAD_BLOCKS"]
    launch(
        _by_query_kernel,
        (triton.cdiv(chunk.last - chunk.first, tiles["BLOCK_QUERIES"]), batch * head_blocks),
        *(q_BTJE, k_BSIE, w_BTJ, b_BTJ, *keys.pointers(), dscores_BRC),
        *(dq_BTJE, dw_BTJ, dw_BTJ if db_BTJ is None else db_BTJ, *k_BSIE.stride()[:3]),
        *(*chunk, queries, keys.columns, width**-0.5),
        HAS_SHIFT=has_shift,
        SELECTED=keys.topk_BTK is not None,
        **tiles,
    )


def _launch_by_key(
    q_BTJE: Tensor,
    k_BSIE: Tensor,
    w_BTJ: Tensor,
    b_BTJ: Tensor,
    dscores_BRC: Tensor,
    chunk: Chunk,
    keys: LossKeys,
    dk_BSIE: Tensor,
    has_shift: bool,
) -> None:
    batch, queries, _, width = q_BTJE.shape
    n_keys, n_key_heads = k_BSIE.shape[1:3]
    tiles = _gradient_tiles(q_BTJE, k_BSIE, keys)
    launch(
        _by_key_kernel,
        (triton.cdiv(n_keys, tiles["BLOCK_KEYS"]), batch * n_key_heads),
        *(q_BTJE, k_BSIE, w_BTJ, b_BTJ, keys.start_BT, keys.stop_BT, dscores_BRC, dk_BSIE),
        *(*k_BSIE.stride()[:3], *chunk, queries, n_keys, width**-0.5),
        HAS_SHIFT=has_shift,
        **tiles,
    )


def _launch_by_selected_key(
    q_BTJE: Tensor,
    k_BSIE: Tensor,
    w_BTJ: Tensor,
    b_BTJ: Tensor,
    dscores_BRC: Tensor,
    chunk: Chunk,
    topk_BRK: Tensor,
    dk_BSIE: Tensor,
    has_shift: bool,
) -> None:
    batch, queries, heads, width = q_BTJE.shape
    n_keys, n_key_heads = k_BSIE.shape[1:3]
    sizes = kernel_sizes("loss_selected_keys")
    block_heads = min(power_of_2(heads // n_key_heads), sizes["rows"])
    launch(
        _by_selected_key_kernel,
        (n_keys, batch * n_key_heads),
        *(q_BTJE, k_BSIE, w_BTJ, b_BTJ, *places_of_keys(topk_BRK, n_keys), dscores_BRC, dk_BSIE),
        *(*k_BSIE.stride()[:3], chunk.first, queries, topk_BRK.shape[1] * topk_BRK.shape[2]),
        *(topk_BRK.shape[2], width**-0.5),
        HAS_SHIFT=has_shift,
        KEY_HEADS=n_key_heads,
        SHARED=heads // n_key_heads,
        WIDTH=width,
        BLOCK_QUERIES=sizes["rows"] // block_heads,
        BLOCK_HEADS=block_heads,
        HEAD_BLOCKS=triton.cdiv(heads // n_key_heads, block_heads),
        BLOCK_WIDTH=power_of_2(width),
        **compile_options(sizes),
    )


def _gradient_tiles(q_BTJE: Tensor, k_BSIE: Tensor, keys: LossKeys) -> dict[str, Any]:
    tiles = pair_tiles("loss_gradients", q_BTJE, k_BSIE, keys)
    del tiles["BLOCK_FIRST"], tiles["BLOCK_REST"], tiles["SELECTED"]
    if tiles["DTYPE"] == tl.float16:
        tiles["DTYPE"] = tl.float32  # in float16 a mean's gradients would be flushed to 0
    return {**tiles, "BLOCK_WIDTH": power_of_2(q_BTJE.shape[3], SMALLEST_PRODUCT)}


@triton.jit
def _by_query_kernel(
    q_BTJE,
    k_BSIE,
    w_BTJ,
    b_BTJ,
    topk_BTK,
    start_BT,
    stop_BT,
    dscores_BRC,
    dq_BTJE,
    dw_BTJ,
    db_BTJ,
    k_stride_b,
    k_stride_s,
    k_stride_i,
    first_query,
    last_query,
    n_queries,
    n_columns,
    scale,
    HAS_SHIFT: tl.constexpr,
    SELECTED: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    SHARED: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    HEAD_BLOCKS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
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
    k_base = k_BSIE + batch * k_stride_b + (head_block // HEAD_BLOCKS) * k_stride_i
    q_RE = index_queries(q_BTJE, row_R, present_R, 0, WIDTH, BLOCK_WIDTH, DTYPE)
    w_R = tl.load(w_BTJ + row_R, mask=present_R, other=0.0)
    dq_RE = tl.zeros([BLOCK_QUERIES * BLOCK_HEADS, BLOCK_WIDTH], tl.float32)
    dw_R = tl.zeros([BLOCK_QUERIES * BLOCK_HEADS], tl.float32)
    db_R = tl.zeros([BLOCK_QUERIES * BLOCK_HEADS], tl.float32)
    first = tl.min(start_R, 0) // BLOCK_KEYS * BLOCK_KEYS
    for low in range(first, tl.max(stop_R, 0), BLOCK_KEYS):
        column_K = low + tl.arange(0, BLOCK_KEYS)
        key_K, there_K = keys_of(topk_BTK, batch * n_queries + query, low, n_columns, BLOCK_KEYS, SELECTED)
        k_KE = load_rows(k_base, key_K * k_stride_s, there_K, 0, WIDTH, BLOCK_WIDTH, DTYPE)
        logits_RK = product(q_RE, tl.trans(k_KE)) * scale
        if HAS_SHIFT:
            logits_RK += tl.load(b_BTJ + row_R, mask=present_R, other=0.0)[:, None]
        visible_RK = within(column_K, start_R, stop_R) & there_K[None, :]
        place_RK = chunk_row_R[:, None] * n_columns + column_K[None, :]
        dscores_RK = tl.load(dscores_BRC + place_RK, mask=visible_RK, other=0.0)
        # As the ReLU's own: nothing at or below 0; NaN goes through.
        active_RK = visible_RK & ((logits_RK > 0) | (logits_RK != logits_RK))
        dw_R += tl.sum(tl.where(active_RK, dscores_RK * logits_RK, 0.0), 1)
        dlogits_RK = tl.where(active_RK, dscores_RK * w_R[:, None], 0.0)
        db_R += tl.sum(dlogits_RK, 1)
        dq_RE += product(dlogits_RK.to(DTYPE), finite_or_zero(k_KE))
    inside_RE = present_R[:, None] & (tl.arange(0, BLOCK_WIDTH) < WIDTH)[None, :]
    place_RE = row_R[:, None] * WIDTH + tl.arange(0, BLOCK_WIDTH)[None, :]
    tl.store(dq_BTJE + place_RE, dq_RE * scale, mask=inside_RE)
    tl.store(dw_BTJ + row_R, dw_R, mask=present_R)
    if HAS_SHIFT:
        tl.store(db_BTJ + row_R, db_R, mask=present_R)


@triton.jit
def _by_key_kernel(
    q_BTJE,
    k_BSIE,
    w_BTJ,
    b_BTJ,
    start_BT,
    stop_BT,
    dscores_BRS,
    dk_BSIE,
    k_stride_b,
    k_stride_s,
    k_stride_i,
    first_query,
    last_query,
    n_queries,
    n_keys,
    scale,
    HAS_SHIFT: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    SHARED: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    HEAD_BLOCKS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    DTYPE: tl.constexpr,
):
    batch, key_head = (tl.program_id(1) // KEY_HEADS).to(tl.int64), tl.program_id(1) % KEY_HEADS
    key_K = tl.program_id(0) * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
    present_K = key_K < n_keys
    k_base = k_BSIE + batch * k_stride_b + key_head * k_stride_i
    k_KE = load_rows(k_base, key_K.to(tl.int64) * k_stride_s, present_K, 0, WIDTH, BLOCK_WIDTH, DTYPE)
    dk_KE = tl.zeros([BLOCK_KEYS, BLOCK_WIDTH], tl.float32)
    for query in range(first_query, last_query, BLOCK_QUERIES):
        for head_block in range(HEAD_BLOCKS):
            query_R, row_R, present_R = pairs_of(
                batch,
                query,
                last_query,
                n_queries,
                key_head * HEAD_BLOCKS + head_block,
                KEY_HEADS,
                SHARED,
                BLOCK_QUERIES,
                BLOCK_HEADS,
                HEAD_BLOCKS,
            )
            start_R = tl.load(start_BT + batch * n_queries + query_R, mask=present_R, other=0)
            stop_R = tl.load(stop_BT + batch * n_queries + query_R, mask=present_R, other=0)
            q_RE = index_queries(q_BTJE, row_R, present_R, 0, WIDTH, BLOCK_WIDTH, DTYPE)
            logits_RK = product(q_RE, tl.trans(k_KE)) * scale
            if HAS_SHIFT:
                logits_RK += tl.load(b_BTJ + row_R, mask=present_R, other=0.0)[:, None]
            visible_RK = within(key_K, start_R, stop_R)
            chunk_row_R = batch * (last_query - first_query) + query_R - first_query
            place_RK = chunk_row_R[:, None] * n_keys + key_K[None, :]
            dscores_RK = tl.load(dscores_BRS + place_RK, mask=visible_RK, other=0.0)
            active_RK = visible_RK & ((logits_RK > 0) | (logits_RK != logits_RK))
            w_R = tl.load(w_BTJ + row_R, mask=present_R, other=0.0)
            dlogits_RK = tl.where(active_RK, dscores_RK * w_R[:, None], 0.0)
            dk_KE += product(tl.trans(dlogits_RK.to(DTYPE)), finite_or_zero(q_RE))
    inside_KE = present_K[:, None] & (tl.arange(0, BLOCK_WIDTH) < WIDTH)[None, :]
    index_K = (batch * n_keys + key_K) * KEY_HEADS + key_head
    place_KE = index_K[:, None] * WIDTH + tl.arange(0, BLOCK_WIDTH)[None, :]
    sum_KE = tl.load(dk_BSIE + place_KE, mask=inside_KE, other=0.0)
    tl.store(dk_BSIE + place_KE, sum_KE + dk_KE * scale, mask=inside_KE)


@triton.jit
def _by_selected_key_kernel(
    q_BTJE,
    k_BSIE,
    w_BTJ,
    b_BTJ,
    pair_BN,
    begin_BS,
    dscores_BN,
    dk_BSIE,
    k_stride_b,
    k_stride_s,
    k_stride_i,
    first_query,
    n_queries,
    n_pairs,
    n_selected,
    scale,
    HAS_SHIFT: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    SHARED: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    HEAD_BLOCKS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    key, n_keys = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    batch, key_head = (tl.program_id(1) // KEY_HEADS).to(tl.int64), tl.program_id(1) % KEY_HEADS
    width_E = tl.arange(0, BLOCK_WIDTH)
    k_row = k_BSIE + batch * k_stride_b + key * k_stride_s + key_head * k_stride_i
    k_E = tl.load(k_row + width_E, mask=width_E < WIDTH, other=0.0).to(tl.float32)
    begin = tl.load(begin_BS + batch * (n_keys + 1) + key)
    end = tl.load(begin_BS + batch * (n_keys + 1) + key + 1)
    # R: pairs of a query that selected this key and a head that reads it
    pair_R = tl.arange(0, BLOCK_QUERIES * BLOCK_HEADS)
    dk_E = tl.zeros([BLOCK_WIDTH], tl.float32)
    for low in range(begin, end, BLOCK_QUERIES):
        chosen_R = low + pair_R // BLOCK_HEADS
        place_R = tl.load(pair_BN + batch * n_pairs + chosen_R, mask=chosen_R < end, other=0)
        dscore_R = tl.load(dscores_BN + batch * n_pairs + place_R, mask=chosen_R < end, other=0.0)
        query_R = batch * n_queries + first_query + place_R // n_selected
        for head_block in range(HEAD_BLOCKS):
            shared_R = head_block * BLOCK_HEADS + pair_R % BLOCK_HEADS
            present_R = (chosen_R < end) & (shared_R < SHARED)
            row_R = query_R * (KEY_HEADS * SHARED) + key_head * SHARED + shared_R
            q_RE = index_queries(q_BTJE, row_R, present_R, 0, WIDTH, BLOCK_WIDTH, tl.float32)
            logits_R = tl.sum(q_RE * k_E[None, :], 1) * scale
            if HAS_SHIFT:
                logits_R += tl.load(b_BTJ + row_R, mask=present_R, other=0.0)
            active_R = present_R & ((logits_R > 0) | (logits_R != logits_R))
            w_R = tl.load(w_BTJ + row_R, mask=present_R, other=0.0)
            dlogits_R = tl.where(active_R, dscore_R * w_R, 0.0)
            dk_E += tl.sum(dlogits_R[:, None] * q_RE, 0)
    place_E = ((batch * n_keys + key) * KEY_HEADS + key_head) * WIDTH + width_E
    sum_E = tl.load(dk_BSIE + place_E, mask=width_E < WIDTH, other=0.0)
    tl.store(dk_BSIE + place_E, sum_E + dk_E * scale, mask=width_E < WIDTH)


@triton.jit
def finite_or_zero(x_RC):
    """What is no number as 0: where it counts, its factor is NaN; where it is hidden, 0 * NaN must be 0."""
    return tl.where(tl.abs(x_RC.to(tl.float32)) < float("inf"), x_RC, 0.0).to(x_RC.dtype)
