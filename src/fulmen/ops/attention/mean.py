"""A layer's attention as one distribution, the mean over heads: what the indexer learns."""

import torch
from torch import Tensor

from fulmen.ops.attention.blocked import group_heads
from fulmen.ops.common.intervals import interval_mask
from fulmen.ops.common.precision import cap_logits, math_dtype
from fulmen.ops.common.tiles import KeyTile, take_keys


@torch.no_grad()
def mean_attention(
    q_THD: Tensor,
    k_SGD: Tensor,
    start_T: Tensor,
    stop_T: Tensor,
    scale: float,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """p_TS of some queries of one text: softmax(scale * q.k) over start <= s < stop, averaged over the heads.

    With sinks, heads count by what these leave to the keys, and p adds up to 1 all the same. 0 outside the
    intervals. The result has T x S numbers: the caller takes few queries at a time.
    """
    tile = KeyTile(slice(0, len(k_SGD)), ~interval_mask(start_T, stop_T, len(k_SGD)))
    return tile_mean_attention(q_THD, k_SGD, tile, scale, softcap, sinks_H)


def tile_mean_attention(
    q_THD: Tensor,
    k_SGD: Tensor,
    tile: KeyTile,
    scale: float,
    softcap: float | None,
    sinks_H: Tensor | None,
) -> Tensor:
    """p_TC: the same over the visible keys of a tile."""
    queries, heads, _ = q_THD.shape
    dtype = math_dtype(q_THD.dtype)
    q_GMD = group_heads(q_THD.to(dtype) * scale, k_SGD.shape[1])
    k_GCD = take_keys(k_SGD, tile.keys, dtype)
    total_TC = q_GMD.new_zeros(queries, k_GCD.shape[1])
    # One key head at a time: no more than its queries' probabilities are alive.
    for g, (q_MD, k_CD) in enumerate(zip(q_GMD, k_GCD, strict=True)):
        scores_XTC = cap_logits((q_MD @ k_CD.T).unflatten(0, (-1, queries)), softcap)
        if tile.hidden_TS is not None:
            scores_XTC.masked_fill_(tile.hidden_TS, -torch.inf)
        probs_XTC = scores_XTC.softmax(-1)
        if sinks_H is not None:
            sinks_X11 = sinks_H.to(dtype).unflatten(0, (len(k_GCD), -1))[g, :, None, None]
            probs_XTC *= (scores_XTC.logsumexp(-1, keepdim=True) - sinks_X11).sigmoid()
        total_TC += probs_XTC.sum(0)
    if tile.hidden_TS is not None:
        total_TC.masked_fill_(tile.hidden_TS, 0)  # a row without keys is NaN so far
    return total_TC.div_(heads) if sinks_H is None else over_keys(total_TC)


def over_keys(p_TS: Tensor) -> Tensor:
    """What sinks left to the keys, as distributions over them; 0 where nothing is left."""
    return p_TS / p_TS.sum(-1, keepdim=True).clamp_min(torch.finfo(p_TS.dtype).tiny)
