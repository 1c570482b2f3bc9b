"""The indexer's side of its loss by a Triton kernel: scores of a chunk of queries."""

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
)
from fulmen.ops.triton_kit import (
    launch,
    load_rows,
    product,
)


def scores_of_chunk(
    q_BTJE: Tensor, k_BSIE: Tensor, w_BTJ: Tensor, b_BTJ: Tensor | None, keys: LossKeys, chunk: Chunk
) -> Tensor:
    """scores_BRC: index scores, -inf where a column has no key; not written where p is not."""
    batch, queries, _, width = q_BTJE.shape
    tiles = pair_tiles("loss", q_BTJE, k_BSIE, keys)
    scores_BRC = torch.empty(batch, chunk.last - chunk.first, keys.columns, device=q_BTJE.device)
    k_BSIE = row_major(k_BSIE)
    launch(
        _scores_kernel,
        grid_of_tiles(scores_BRC, tiles),
        *(q_BTJE.contiguous(), k_BSIE, *weights_of_heads(w_BTJ, b_BTJ), *keys.pointers(), scores_BRC),
        *(*k_BSIE.stride()[:3], *chunk, queries, keys.columns, width**-0.5),
        HAS_SHIFT=b_BTJ is not None,
        **tiles,
    )
    return scores_BRC


def weights_of_heads(w_BTJ: Tensor, b_BTJ: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weights and shifts in float32, as kernels read them; the second is never read where there are none."""
    w_BTJ = w_BTJ.float().contiguous()
    return w_BTJ, w_BTJ if b_BTJ is None else b_BTJ.float().contiguous()


@triton.jit
def _scores_kernel(
    q_BTJE,
    k_BSIE,
    w_BTJ,
    b_BTJ,
    topk_BTK,
    start_BT,
    stop_BT,
    scores_BRC,
    k_stride_b,
    k_stride_s,
    k_stride_i,
    first_query,
    last_query,
    n_queries,
    n_columns,
    scale,
    HAS_SHIFT: tl.constexpr,
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
    scores_TK = tl.zeros([BLOCK_QUERIES, BLOCK_KEYS], tl.float32)
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
        k_base = k_BSIE + batch * k_stride_b + (head_block // HEAD_BLOCKS) * k_stride_i
        key_offset_K = key_K * k_stride_s
        q_RE = index_queries(q_BTJE, row_R, present_R, 0, WIDTH, BLOCK_FIRST, DTYPE)
        k_KE = load_rows(k_base, key_offset_K, there_K, 0, WIDTH, BLOCK_FIRST, DTYPE)
        logits_RK = product(q_RE, tl.trans(k_KE))
        if BLOCK_REST > 0:
            q_RX = index_queries(q_BTJE, row_R, present_R, BLOCK_FIRST, WIDTH, BLOCK_REST, DTYPE)
            k_KX = load_rows(k_base, key_offset_K, there_K, BLOCK_FIRST, WIDTH, BLOCK_REST, DTYPE)
            logits_RK += product(q_RX, tl.trans(k_KX))
        logits_RK *= scale
        if HAS_SHIFT:
            logits_RK += tl.load(b_BTJ + row_R, mask=present_R, other=0.0)[:, None]
        # Written so that NaN stays NaN.
        relu_RK = tl.where(logits_RK < 0, 0.0, logits_RK)
        weighted_RK = relu_RK * tl.load(w_BTJ + row_R, mask=present_R, other=0.0)[:, None]
        weighted_RK = tl.where(present_R[:, None], weighted_RK, 0.0)
        scores_TK += tl.sum(tl.reshape(weighted_RK, [BLOCK_QUERIES, BLOCK_HEADS, BLOCK_KEYS]), 1)
    scores_TK = tl.where(there_K[None, :], scores_TK, float("-inf"))
    index_TK = place_in_chunk(
        batch, query, low, first_query, last_query, n_columns, BLOCK_QUERIES, BLOCK_KEYS
    )
    tl.store(scores_BRC + index_TK, scores_TK, mask=inside_TK)


@triton.jit
def index_queries(
    q_BTJE,
    row_R,
    present_R,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """As `load_rows`; infinity as NaN: a query that is not finite scores NaN, whatever the keys."""
    q_RE = load_rows(q_BTJE, row_R * WIDTH, present_R, FIRST, WIDTH, BLOCK, DTYPE)
    return tl.where(tl.abs(q_RE.to(tl.float32)) == float("inf"), float("nan"), q_RE).to(DTYPE)
