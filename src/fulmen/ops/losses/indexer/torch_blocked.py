"""The indexer's loss in blocks of queries, each recomputed in the backward pass; plain torch, any device."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fulmen.ops.attention.mean import tile_mean_attention
from fulmen.ops.common.precision import math_dtype
from fulmen.ops.common.tiles import (
    LEAST_LOSS_ROWS,
    KeyTile,
    interval_blocks,
    selected_tile,
    take_keys,
    zero_bad_keys,
)
from fulmen.ops.dispatch import implements
from fulmen.ops.losses.indexer.reference import IndexerLoss
from fulmen.ops.scores.torch_blocked import score_keys

# Numbers in the largest tensor of a block: queries x keys x (index heads, or heads of one key head). Measured
# on one core (256 queries; 2 K and 8 K keys; 9 heads of 64): the fastest of 2**18 to 2**22, or within 5 %.
LOSS_BLOCK_NUMBERS = 2**21

# The blocks of batch row b: query rows, and how to make the tile with the keys of all of them. Made only when
# a block is computed, because the masks of all blocks together would be T x S.
LossBlocks = Callable[[int], Iterator[tuple[slice, Callable[[], KeyTile]]]]


@implements("indexer_loss", "torch")
def indexer_loss_blocked(
    q_BTJE: Tensor,
    k_BSIE: Tensor,
    w_BTJ: Tensor,
    b_BTJ: Tensor | None,
    attn_q_BTHD: Tensor,
    attn_k_BSGD: Tensor,
    start_BT: Tensor,
    stop_BT: Tensor,
    scale: float,
    softcap: float | None,
    sinks_H: Tensor | None,
) -> IndexerLoss:
    """See `fulmen.ops.losses.indexer.indexer_loss`."""
    n_keys = k_BSIE.shape[1]
    n_rows = _loss_block_rows(n_keys, q_BTJE, attn_q_BTHD, attn_k_BSGD)

    def blocks(b: int) -> Iterator[tuple[slice, Callable[[], KeyTile]]]:
        for block in interval_blocks(start_BT[b], stop_BT[b], n_keys, n_rows):
            yield block.rows, partial(block.tile, block.first, block.last)

    softmax = (scale, softcap, sinks_H)
    return _loss_over_blocks(blocks, q_BTJE, k_BSIE, w_BTJ, b_BTJ, attn_q_BTHD, attn_k_BSGD, *softmax)


@implements("indexer_loss_selected", "torch")
def indexer_loss_selected_blocked(
    q_BTJE: Tensor,
    k_BSIE: Tensor,
    w_BTJ: Tensor,
    b_BTJ: Tensor | None,
    attn_q_BTHD: Tensor,
    attn_k_BSGD: Tensor,
    topk_BTK: Tensor,
    scale: float,
    softcap: float | None,
    sinks_H: Tensor | None,
) -> IndexerLoss:
    """See `fulmen.ops.losses.indexer.indexer_loss_selected`."""
    n_keys = k_BSIE.shape[1]
    n_rows = _loss_block_rows(n_keys, q_BTJE, attn_q_BTHD, attn_k_BSGD)

    def blocks(b: int) -> Iterator[tuple[slice, Callable[[], KeyTile]]]:
        for low in range(0, topk_BTK.shape[1], n_rows):
            rows = slice(low, min(low + n_rows, topk_BTK.shape[1]))
            yield rows, partial(selected_tile, topk_BTK[b, rows], n_keys)

    softmax = (scale, softcap, sinks_H)
    return _loss_over_blocks(blocks, q_BTJE, k_BSIE, w_BTJ, b_BTJ, attn_q_BTHD, attn_k_BSGD, *softmax)


def _loss_block_rows(n_keys: int, q_BTJE: Tensor, attn_q_BTHD: Tensor, attn_k_BSGD: Tensor) -> int:
    largest = max(q_BTJE.shape[2], attn_q_BTHD.shape[2] // attn_k_BSGD.shape[2]) * max(n_keys, 1)
    return max(LOSS_BLOCK_NUMBERS // largest, LEAST_LOSS_ROWS)


def _loss_over_blocks(
    blocks: LossBlocks,
    q_BTJE: Tensor,
    k_BSIE: Tensor,
    w_BTJ: Tensor,
    b_BTJ: Tensor | None,
    attn_q_BTHD: Tensor,
    attn_k_BSGD: Tensor,
    scale: float,
    softcap: float | None,
    sinks_H: Tensor | None,
) -> IndexerLoss:
    # Zeros with a gradient: a batch of nothing but padding can be trained on too.
    kl_BT = w_BTJ[..., :0].sum(-1, dtype=math_dtype(q_BTJE.dtype))
    entropy_BT = torch.zeros_like(kl_BT)
    for b in range(len(q_BTJE)):
        for rows, make_tile in blocks(b):
            b_TJ = None if b_BTJ is None else b_BTJ[b, rows]
            kl_BT[b, rows], entropy_BT[b, rows] = checkpoint(
                _loss_block,
                *(q_BTJE[b, rows], k_BSIE[b], w_BTJ[b, rows], b_TJ, attn_q_BTHD[b, rows], attn_k_BSGD[b]),
                *(make_tile, scale, softcap, sinks_H),
                use_reentrant=False,
                preserve_rng_state=False,
            )
    return IndexerLoss(kl_BT, entropy_BT)


def _loss_block(
    q_TJE: Tensor,
    k_SIE: Tensor,
    w_TJ: Tensor,
    b_TJ: Tensor | None,
    attn_q_THD: Tensor,
    attn_k_SGD: Tensor,
    make_tile: Callable[[], KeyTile],
    scale: float,
    softcap: float | None,
    sinks_H: Tensor | None,
) -> tuple[Tensor, Tensor]:
    tile = make_tile()
    with torch.no_grad():
        target_TC = tile_mean_attention(attn_q_THD, attn_k_SGD, tile, scale, softcap, sinks_H)
        entropy_T = -torch.xlogy(target_TC, target_TC).sum(-1)
    log_index_TC = _log_index(q_TJE, k_SIE, w_TJ, b_TJ, tile)
    return -(target_TC * log_index_TC).sum(-1) - entropy_T, entropy_T


def _log_index(q_TJE: Tensor, k_SIE: Tensor, w_TJ: Tensor, b_TJ: Tensor | None, tile: KeyTile) -> Tensor:
    """log softmax(I) over the visible keys of the tile; very low, but finite, where hidden."""
    if tile.hidden_TS is None:
        return score_keys(q_TJE, k_SIE[tile.keys], w_TJ, b_TJ).log_softmax(-1)
    k_ICE, bad_C = zero_bad_keys(take_keys(k_SIE, tile.keys, k_SIE.dtype))
    scores_TC = score_keys(q_TJE, k_ICE.transpose(0, 1), w_TJ, b_TJ)
    if bad_C is not None:
        scores_TC = scores_TC.masked_fill(bad_C, torch.nan)
    # Finite, because the target is 0 there and 0 * inf is NaN.
    return scores_TC.masked_fill(tile.hidden_TS, torch.finfo(scores_TC.dtype).min).log_softmax(-1)
