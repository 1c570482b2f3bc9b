"""Selection in two levels, block by block; plain torch, any device."""

import torch
from torch import Tensor

from fulmen.ops.common.tiles import interval_blocks
from fulmen.ops.dispatch import implements
from fulmen.ops.scores.torch_blocked import index_block_rows, score_keys
from fulmen.ops.topk.torch_blocked import index_topk_blocked, select_topk_blocked
from fulmen.ops.two_level.coarse import as_indexer, most_for_nan, positions_of_chosen


@implements("two_level_topk", "torch")
def two_level_topk_blocked(
    coarse_q_BTMN: Tensor,
    packed_BSX: Tensor,
    coarse_b_BTM: Tensor,
    q_BTJE: Tensor,
    k_BSIE: Tensor,
    w_BTJ: Tensor,
    b_BTJ: Tensor | None,
    start_BT: Tensor,
    stop_BT: Tensor,
    topk: int,
    n_candidates: int,
    all_up_to: int,
) -> Tensor:
    """See `fulmen.ops.two_level.two_level_topk`; the coarse keys are packed."""
    n_keys = k_BSIE.shape[1]
    visible_BT = stop_BT.clamp(0, n_keys) - start_BT.clamp(min=0)
    far_BT = visible_BT > all_up_to
    alone = (q_BTJE, k_BSIE, w_BTJ, b_BTJ, start_BT, torch.where(far_BT, start_BT, stop_BT))
    near_BTK = index_topk_blocked(*alone, topk)
    far_BTK = _far_queries(
        coarse_q_BTMN,
        packed_BSX,
        coarse_b_BTM,
        *alone[:4],
        start_BT,
        torch.where(far_BT, stop_BT, start_BT),
        topk,
        n_candidates,
    )
    return torch.where(far_BT[..., None], far_BTK, near_BTK)


def _far_queries(
    coarse_q_BTMN: Tensor,
    packed_BSX: Tensor,
    coarse_b_BTM: Tensor,
    q_BTJE: Tensor,
    k_BSIE: Tensor,
    w_BTJ: Tensor,
    b_BTJ: Tensor | None,
    start_BT: Tensor,
    stop_BT: Tensor,
    topk: int,
    n_candidates: int,
) -> Tensor:
    """Those whose candidates are chosen; the others have empty intervals."""
    n_keys = k_BSIE.shape[1]
    topk_BTK = q_BTJE.new_full((*q_BTJE.shape[:2], min(topk, n_keys)), -1, dtype=torch.int32)
    n_rows = index_block_rows(max(q_BTJE.shape[2], coarse_q_BTMN.shape[2]), k_BSIE)
    q_BTMN, coarse_k_BSIX, w_BTM = as_indexer(coarse_q_BTMN, packed_BSX)
    for b in range(len(q_BTJE)):
        for block in interval_blocks(start_BT[b], stop_BT[b], n_keys, n_rows):
            hull, rows = slice(block.first, block.last), block.rows
            coarse = (q_BTMN[b, rows], coarse_k_BSIX[b, hull], w_BTM[b, rows], coarse_b_BTM[b, rows])
            coarse_TS = most_for_nan(score_keys(*coarse))
            candidates_TC = _selected(coarse_TS, block.start_T, block.stop_T, block.first, n_candidates)
            b_TJ = None if b_BTJ is None else b_BTJ[b, rows]
            fine = (q_BTJE[b, rows], k_BSIE[b, hull], w_BTJ[b, rows], b_TJ)
            fine_TC = _score_candidates(*fine, candidates_TC)
            count_T = (candidates_TC >= 0).sum(-1)
            chosen_TK = _selected(fine_TC, torch.zeros_like(count_T), count_T, 0, topk)
            found_TK = positions_of_chosen(chosen_TK, candidates_TC)
            topk_BTK[b, rows, : found_TK.shape[-1]] = torch.where(found_TK < 0, -1, found_TK + block.first)
    return topk_BTK


def _selected(scores_TC: Tensor, start_T: Tensor, stop_T: Tensor, first: int, n: int) -> Tensor:
    """`select_topk` of one batch row whose column 0 is the key `first`; columns, not positions."""
    return select_topk_blocked(scores_TC[None], start_T[None] - first, stop_T[None] - first, n)[0]


def _score_candidates(
    q_TJE: Tensor, k_SIE: Tensor, w_TJ: Tensor, b_TJ: Tensor | None, candidates_TC: Tensor
) -> Tensor:
    """`[T, C]` index scores of each query's candidates, anything where there are fewer.

    Many queries share a product over all keys, which costs less than to gather keys for each; a few, as in
    decoding, gather theirs.
    """
    columns_TC = candidates_TC.clamp(min=0).long()
    if candidates_TC.numel() >= len(k_SIE):
        return score_keys(q_TJE, k_SIE, w_TJ, b_TJ).gather(-1, columns_TC)
    rows = [
        score_keys(q_TJE[t, None], k_SIE[columns_C], w_TJ[t, None], None if b_TJ is None else b_TJ[t, None])
        for t, columns_C in enumerate(columns_TC)
    ]
    return torch.cat(rows)
