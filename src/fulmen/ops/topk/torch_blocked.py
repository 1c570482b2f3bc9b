"""Selection by one exact integer top-k per block of queries; plain torch, any device."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from fulmen.ops.common.precision import math_dtype
from fulmen.ops.common.tiles import IntervalBlock, interval_blocks
from fulmen.ops.dispatch import implements
from fulmen.ops.scores.torch_blocked import index_block_rows, score_keys

# Scores of one block; their 64-bit keys take 8 MB.
SELECT_BLOCK_SCORES = 2**20
LOW_BITS = 2**32 - 1
NO_KEY = torch.iinfo(torch.int32).max
HIDDEN_RANK = torch.iinfo(torch.int64).min


@implements("select_topk", "torch")
def select_topk_blocked(scores_BTS: Tensor, start_BT: Tensor, stop_BT: Tensor, topk: int) -> Tensor:
    """See `fulmen.ops.topk.select_topk`."""
    n_keys = scores_BTS.shape[-1]
    topk_BTK = _nothing_selected(scores_BTS, n_keys, topk)
    for b in range(len(scores_BTS)):
        for block in interval_blocks(start_BT[b], stop_BT[b], n_keys, _select_block_rows(n_keys)):
            if block.most_keys <= topk:
                topk_BTK[b, block.rows] = _take_all(block, topk_BTK.shape[-1])
            else:
                scores_TS = scores_BTS[b, block.rows, block.first : block.last]
                topk_BTK[b, block.rows] = _take_best(scores_TS, block, topk_BTK.shape[-1])
    return topk_BTK


@implements("index_topk", "torch")
def index_topk_blocked(
    q_BTJE: Tensor,
    k_BSIE: Tensor,
    w_BTJ: Tensor,
    b_BTJ: Tensor | None,
    start_BT: Tensor,
    stop_BT: Tensor,
    topk: int,
) -> Tensor:
    """See `fulmen.ops.topk.index_topk`. Queries that see no more than `topk` keys are not scored."""
    n_keys = k_BSIE.shape[1]
    n_rows = min(_select_block_rows(n_keys), index_block_rows(q_BTJE.shape[2], k_BSIE))
    topk_BTK = _nothing_selected(q_BTJE, n_keys, topk)
    for b in range(len(q_BTJE)):
        for block in interval_blocks(start_BT[b], stop_BT[b], n_keys, n_rows):
            if block.most_keys <= topk:
                topk_BTK[b, block.rows] = _take_all(block, topk_BTK.shape[-1])
            else:
                q_TJE, w_TJ = q_BTJE[b, block.rows], w_BTJ[b, block.rows]
                b_TJ = None if b_BTJ is None else b_BTJ[b, block.rows]
                scores_TS = score_keys(q_TJE, k_BSIE[b, block.first : block.last], w_TJ, b_TJ)
                topk_BTK[b, block.rows] = _take_best(scores_TS, block, topk_BTK.shape[-1])
    return topk_BTK


def _nothing_selected(like_BTX: Tensor, n_keys: int, topk: int) -> Tensor:
    shape = (*like_BTX.shape[:2], min(topk, n_keys))
    return torch.full(shape, -1, dtype=torch.int32, device=like_BTX.device)


def _select_block_rows(n_keys: int) -> int:
    return max(SELECT_BLOCK_SCORES // max(n_keys, 1), 1)


def _take_all(block: IntervalBlock, n_columns: int) -> Tensor:
    keys_TK = block.start_T[:, None] + torch.arange(n_columns, device=block.start_T.device)
    return torch.where(keys_TK < block.stop_T[:, None], keys_TK, -1).int()


def _take_best(scores_TS: Tensor, block: IntervalBlock, n_columns: int) -> Tensor:
    """The best visible keys of a block; `scores_TS` are those of its hull."""
    ranks_TS = _rank_scores(scores_TS)
    hidden_TS = block.tile(block.first, block.last).hidden_TS
    if hidden_TS is not None:
        ranks_TS.masked_fill_(hidden_TS, HIDDEN_RANK)
    best_TK = ranks_TS.topk(min(n_columns, ranks_TS.shape[-1]), sorted=False).values
    keys_TK = (best_TK & LOW_BITS).add_(block.first).masked_fill_(best_TK == HIDDEN_RANK, NO_KEY)
    ascending_TK = keys_TK.int().sort(-1).values
    ascending_TK.masked_fill_(ascending_TK == NO_KEY, -1)
    return pad(ascending_TK, (0, n_columns - ascending_TK.shape[-1]), value=-1)


def _rank_scores(scores_TS: Tensor) -> Tensor:
    """int64 ordered as (score, position), so all different; NaN ranks below all numbers."""
    numbers_TS = scores_TS.to(math_dtype(scores_TS.dtype)) + 0.0  # turns -0.0 into 0.0
    ordered_TS = _as_ordered_integers(numbers_TS)
    if numbers_TS.dtype == torch.float64:  # positions need half of the bits: equal numbers are numbered alike
        ordered_TS = ordered_TS.unique(return_inverse=True)[1]
    positions_S = torch.arange(scores_TS.shape[-1], device=scores_TS.device)
    return ordered_TS.long().bitwise_left_shift_(32).bitwise_or_(positions_S)


def _as_ordered_integers(numbers_TS: Tensor) -> Tensor:
    """float32 as int32, float64 as int64, in the same order, NaN below all.

    The bits of a float are ordered as an integer once those below the sign are flipped in negative numbers.
    """
    integer = torch.int64 if numbers_TS.dtype == torch.float64 else torch.int32
    info = torch.iinfo(integer)
    bits_TS = numbers_TS.view(integer)
    ordered_TS = bits_TS ^ ((bits_TS >> (info.bits - 1)) & info.max)
    return ordered_TS.masked_fill_(numbers_TS.isnan(), info.min + 1)
