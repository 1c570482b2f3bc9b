"""Selection in two levels, the specification: two selections, the second among what the first has left."""

import torch
from torch import Tensor

from fulmen.ops.dispatch import implements
from fulmen.ops.scores.reference import index_scores_reference
from fulmen.ops.topk.reference import select_topk_reference
from fulmen.ops.two_level.coarse import as_indexer, most_for_nan, positions_of_chosen


@implements("two_level_topk", "reference")
def two_level_topk_reference(
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
    coarse = (*as_indexer(coarse_q_BTMN, packed_BSX), coarse_b_BTM)
    coarse_BTS = most_for_nan(index_scores_reference(*coarse, start_BT, stop_BT).scores_BTS)
    candidates_BTC = select_topk_reference(coarse_BTS, start_BT, stop_BT, n_candidates)
    fine_BTS = index_scores_reference(q_BTJE, k_BSIE, w_BTJ, b_BTJ, start_BT, stop_BT).scores_BTS
    fine_BTC = fine_BTS.gather(-1, candidates_BTC.clamp(min=0).long())
    count_BT = (candidates_BTC >= 0).sum(-1)
    chosen_BTK = select_topk_reference(fine_BTC, torch.zeros_like(count_BT), count_BT, topk)
    chosen_BTK = positions_of_chosen(chosen_BTK, candidates_BTC)
    visible_BT = stop_BT.clamp(0, fine_BTS.shape[-1]) - start_BT.clamp(min=0)
    alone_BTK = select_topk_reference(fine_BTS, start_BT, stop_BT, topk)
    return torch.where((visible_BT <= all_up_to)[..., None], alone_BTK, chosen_BTK)
