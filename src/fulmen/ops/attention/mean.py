"""A layer's attention as one distribution, the mean over heads: what the indexer learns."""

import torch
from torch import Tensor

from fulmen.ops.attention.blocked import group_heads
from fulmen.ops.common.intervals import interval_mask
from fulmen.ops.common.precision import math_dtype
from fulmen.ops.common.tiles import KeyTile, take_keys


@torch.no_grad()
def mean_attention(q_THD: Tensor, k_SGD: Tensor, start_T: Tensor, stop_T: Tensor, scale: float) -> Tensor:
    """p_TS of some queries of one text: softmax(scale * q.k) over start <= s < stop, averaged over the heads.

    0 outside the intervals. The result has T x S numbers: the caller takes few queries at a time.
    """
    tile = KeyTile(slice(0, len(k_SGD)), ~interval_mask(start_T, stop_T, len(k_SGD)))
    return tile_mean_attention(q_THD, k_SGD, tile, scale)


def tile_mean_attention(q_THD: Tensor, k_SGD: Tensor, tile: KeyTile, scale: float) -> Tensor:
    """p_TC: the same over the visible keys of a tile."""
    queries, heads, _ = q_THD.shape
    dtype = math_dtype(q_THD.dtype)
    q_GMD = group_heads(q_THD.to(dtype) * scale, k_SGD.shape[1])
    k_GCD = take_keys(k_SGD, tile.keys, dtype)
    total_TC = q_GMD.new_zeros(queries, k_GCD.shape[1])
    # One key head at a time: no more than its queries' probabilities are alive.
    for q_MD, k_CD in zip(q_GMD, k_GCD, strict=True):
        scores_XTC = (q_MD @ k_CD.T).unflatten(0, (-1, queries))
        if tile.hidden_TS is not None:
            scores_XTC.masked_fill_(tile.hidden_TS, -torch.inf)
        total_TC += scores_XTC.softmax(-1).sum(0)
    if tile.hidden_TS is not None:
        total_TC.masked_fill_(tile.hidden_TS, 0)  # a row without keys is NaN so far
    return total_TC.div_(heads)
