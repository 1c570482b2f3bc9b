"""Selection in two levels by the Triton kernels for scores and selection.

Many queries share a product over all keys, at both levels, which costs less than to gather candidates' keys
for each; so the second level saves no work here, as it does where tokens are decoded (`ops/paged`).
"""

import torch
from torch import Tensor

from fulmen.ops.common.index_keys import unpacked_index_inputs
from fulmen.ops.scores.triton import launch_index_scores
from fulmen.ops.topk.triton import HELD_SCORES, launch_select
from fulmen.ops.two_level.coarse import as_indexer, most_for_nan, positions_of_chosen


def two_level_topk_triton(
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
    (batch, queries), n_keys = q_BTJE.shape[:2], k_BSIE.shape[1]
    q_BTJE, k_BSIE = unpacked_index_inputs(q_BTJE, k_BSIE)
    q_BTMN, coarse_k_BSIX, w_BTM = as_indexer(coarse_q_BTMN, packed_BSX)
    coarse_q_BTMN, coarse_k_BSIN = unpacked_index_inputs(q_BTMN, coarse_k_BSIX)
    start_BT, stop_BT = (x.clamp(0, n_keys) for x in (start_BT, stop_BT))
    topk_BTK = torch.empty(batch, queries, min(topk, n_keys), dtype=torch.int32, device=q_BTJE.device)
    # Two blocks of scores are held at a time.
    n_queries = max(HELD_SCORES // 2 // max(n_keys, 1), 1)
    for b in range(batch):
        for t in range(0, queries, n_queries):
            some, own = (slice(b, b + 1), slice(t, t + n_queries)), slice(b, b + 1)
            coarse = (coarse_q_BTMN[some], coarse_k_BSIN[own], w_BTM[some], coarse_b_BTM[some])
            b_TJ = None if b_BTJ is None else b_BTJ[some]
            fine = (q_BTJE[some], k_BSIE[own], w_BTJ[some], b_TJ)
            limits = (topk_BTK.shape[-1], min(n_candidates, n_keys), all_up_to)
            topk_BTK[some] = _select_some(coarse, fine, start_BT[some], stop_BT[some], *limits)
    return topk_BTK


def _select_some(
    coarse: tuple[Tensor, Tensor, Tensor, Tensor],
    fine: tuple[Tensor, Tensor, Tensor, Tensor | None],
    start_BT: Tensor,
    stop_BT: Tensor,
    topk: int,
    n_candidates: int,
    all_up_to: int,
) -> Tensor:
    """topk_BTK of queries whose scores are held all at once."""
    far_BT = stop_BT - start_BT > all_up_to
    scores_BTS = torch.empty(*start_BT.shape, fine[1].shape[1], device=start_BT.device)
    launch_index_scores(*coarse, start_BT, stop_BT, scores_BTS, enough=all_up_to)
    # Of other queries nothing is scored, and nothing selected.
    far_stop_BT = torch.where(far_BT, stop_BT, start_BT)
    candidates_BTC = launch_select(most_for_nan(scores_BTS), start_BT, far_stop_BT, n_candidates)
    launch_index_scores(*fine, start_BT, stop_BT, scores_BTS, enough=topk)
    near_BTK = launch_select(scores_BTS, start_BT, torch.where(far_BT, start_BT, stop_BT), topk)
    fine_BTC = scores_BTS.gather(-1, candidates_BTC.clamp(min=0).long())
    count_BT = torch.where(far_BT, n_candidates, 0)
    chosen_BTK = launch_select(fine_BTC, torch.zeros_like(count_BT), count_BT, topk)
    return torch.where(far_BT[..., None], positions_of_chosen(chosen_BTK, candidates_BTC), near_BTK)
