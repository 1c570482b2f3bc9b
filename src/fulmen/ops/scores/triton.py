"""Index scores by a Triton kernel: one tile of keys, all index heads of a few queries.

The rows of its matrix products are (query, head) pairs that read one index key head, so decoding fills them
as well as prefill does; one kernel of one shape serves both, and adds every score in one order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fulmen.ops.common.index_keys import unpacked_index_inputs
from fulmen.ops.cpp.library import row_major
from fulmen.ops.triton_kit import (
    SMALLEST_PRODUCT,
    compile_options,
    kernel_sizes,
    load_rows,
    on_device_of,
    power_of_2,
    product,
    product_dtype,
)


def index_scores_triton(
    q_BTJE: Tensor,
    k_BSIE: Tensor,
    w_BTJ: Tensor,
    b_BTJ: Tensor | None,
    start_BT: Tensor,
    stop_BT: Tensor,
) -> Tensor:
    """See `fulmen.ops.scores.index_scores`."""
    q_BTJE, k_BSIE = unpacked_index_inputs(q_BTJE, k_BSIE)
    shape = (*q_BTJE.shape[:2], k_BSIE.shape[1])
    scores_BTS = torch.full(shape, -torch.inf, dtype=torch.float32, device=q_BTJE.device)
    launch_index_scores(q_BTJE, k_BSIE, w_BTJ, b_BTJ, start_BT, stop_BT, scores_BTS, enough=0)
    return scores_BTS


def launch_index_scores(
    q_BTJE: Tensor,
    k_BSIE: Tensor,
    w_BTJ: Tensor,
    b_BTJ: Tensor | None,
    start_BT: Tensor,
    stop_BT: Tensor,
    scores_BTS: Tensor,
    enough: int,
) -> None:
    """Write into `scores_BTS` the visible scores of queries that see more than `enough` keys, no others."""
    batch, queries, heads, width = q_BTJE.shape
    n_keys, n_key_heads = k_BSIE.shape[1:3]
    if not scores_BTS.numel():
        return
    shared = heads // n_key_heads
    sizes = kernel_sizes("index_scores")
    block_heads = power_of_2(shared)
    block_queries = max(sizes["rows"] // block_heads, 1, SMALLEST_PRODUCT // block_heads)
    k_BSIE, shift_BTJ = row_major(k_BSIE), w_BTJ if b_BTJ is None else b_BTJ
    # Neighbours read the same keys.
    grid = (triton.cdiv(queries, block_queries), triton.cdiv(n_keys, sizes["columns"]), batch)
    interval = (x.clamp(0, n_keys).int().contiguous() for x in (start_BT, stop_BT))
    with on_device_of(q_BTJE):
        _index_scores_kernel[grid](
            *(q_BTJE.contiguous(), k_BSIE, w_BTJ.float().contiguous(), shift_BTJ.float().contiguous()),
            *(*interval, scores_BTS, *k_BSIE.stride()[:3]),
            *(queries, n_keys, enough, width**-0.5),
            HAS_SHIFT=b_BTJ is not None,
            KEY_HEADS=n_key_heads,
            SHARED=shared,
            WIDTH=width,
            BLOCK_QUERIES=block_queries,
            BLOCK_HEADS=block_heads,
            BLOCK_KEYS=sizes["columns"],
            BLOCK_WIDTH=power_of_2(width, SMALLEST_PRODUCT),
            DTYPE=product_dtype(q_BTJE),
            **compile_options(sizes),
        )


# One compiled kernel for all lengths: not another for those that are 1, or a multiple of 16.
@triton.jit(do_not_specialize=["n_queries", "n_keys", "enough"])
def _index_scores_kernel(
    q_BTJE,
    k_BSIE,
    w_BTJ,
    b_BTJ,
    start_BT,
    stop_BT,
    scores_BTS,
    k_stride_b,
    k_stride_s,
    k_stride_i,
    n_queries,
    n_keys,
    enough,
    scale,
    HAS_SHIFT: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    SHARED: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    DTYPE: tl.constexpr,
):
    batch = tl.program_id(2).to(tl.int64)
    query_T = tl.program_id(0) * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    key_S = tl.program_id(1) * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
    present_T = query_T < n_queries
    start_T = tl.load(start_BT + batch * n_queries + query_T, mask=present_T, other=0)
    stop_T = tl.load(stop_BT + batch * n_queries + query_T, mask=present_T, other=0)
    wanted_T = stop_T - start_T > enough
    visible_TS = (key_S[None, :] >= start_T[:, None]) & (key_S[None, :] < stop_T[:, None]) & wanted_T[:, None]
    if tl.max(tl.max(visible_TS.to(tl.int32), 1), 0) == 0:
        return

    # R: pairs of a query and one of the heads that share an index key head
    pair_R = tl.arange(0, BLOCK_QUERIES * BLOCK_HEADS)
    pair_query_R = tl.program_id(0) * BLOCK_QUERIES + pair_R // BLOCK_HEADS
    head_R = pair_R % BLOCK_HEADS
    present_R = (pair_query_R < n_queries) & (head_R < SHARED)
    present_S = key_S < n_keys
    scores_TS = tl.zeros([BLOCK_QUERIES, BLOCK_KEYS], tl.float32)
    for key_head in range(KEY_HEADS):
        row_R = (batch * n_queries + pair_query_R) * (KEY_HEADS * SHARED) + key_head * SHARED + head_R
        q_RE = load_rows(q_BTJE, row_R * WIDTH, present_R, 0, WIDTH, BLOCK_WIDTH, DTYPE)
        # A query that is not finite scores NaN.
        q_RE = tl.where(tl.abs(q_RE.to(tl.float32)) == float("inf"), float("nan"), q_RE).to(DTYPE)
        key_base = k_BSIE + batch * k_stride_b + key_head * k_stride_i
        k_SE = load_rows(key_base, key_S.to(tl.int64) * k_stride_s, present_S, 0, WIDTH, BLOCK_WIDTH, DTYPE)
        logits_RS = product(q_RE, tl.trans(k_SE)) * scale
        if HAS_SHIFT:
            logits_RS += tl.load(b_BTJ + row_R, mask=present_R, other=0.0)[:, None]
        # Written so that NaN stays NaN.
        relu_RS = tl.where(logits_RS < 0, 0.0, logits_RS)
        weighted_RS = relu_RS * tl.load(w_BTJ + row_R, mask=present_R, other=0.0)[:, None]
        weighted_RS = tl.where(present_R[:, None], weighted_RS, 0.0)
        scores_TS += tl.sum(tl.reshape(weighted_RS, [BLOCK_QUERIES, BLOCK_HEADS, BLOCK_KEYS]), 1)
    index_TS = (batch * n_queries + query_T.to(tl.int64))[:, None] * n_keys + key_S[None, :]
    tl.store(scores_BTS + index_TS, scores_TS, mask=visible_TS)
