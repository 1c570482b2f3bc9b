"""Specification of the selection loss: what a soft top-k would change in the attention's output."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fulmen.ops.attention.sinks import softmax_with_sinks
from fulmen.ops.common.intervals import interval_mask
from fulmen.ops.common.precision import cap_logits
from fulmen.ops.dispatch import implements
from fulmen.ops.scores.reference import index_scores_reference


class SelectionLossSteps(NamedTuple):
    """Every intermediate; loss_BT is the result."""

    scores_BTS: Tensor
    cut_BT: Tensor
    log_gate_BTS: Tensor
    dense_BTHV: Tensor
    gated_BTHV: Tensor
    loss_BT: Tensor


def selection_loss_reference(
    q_BTJE: Tensor,
    k_BSIE: Tensor,
    w_BTJ: Tensor,
    b_BTJ: Tensor | None,
    attn_q_BTHD: Tensor,
    attn_k_BSGD: Tensor,
    attn_v_BSGV: Tensor,
    out_weight_CN: Tensor,
    start_BT: Tensor,
    stop_BT: Tensor,
    topk: int,
    scale: float,
    temperature: float,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
    out_gate_BTN: Tensor | None = None,
) -> SelectionLossSteps:
    """See `fulmen.ops.losses.selection.selection_loss`."""
    visible_BTS = interval_mask(start_BT, stop_BT, k_BSIE.shape[1])
    scores_BTS = index_scores_reference(q_BTJE, k_BSIE, w_BTJ, b_BTJ, start_BT, stop_BT).scores_BTS
    cut_BT = _score_at_the_cut(scores_BTS, visible_BTS, topk)
    distance_BTS = (scores_BTS.masked_fill(~visible_BTS, 0) - cut_BT[..., None]) / temperature
    log_gate_BTS = torch.nn.functional.logsigmoid(distance_BTS)
    shared = attn_q_BTHD.shape[2] // attn_k_BSGD.shape[2]
    k_BSHD, v_BSHV = (x.repeat_interleave(shared, 2) for x in (attn_k_BSGD, attn_v_BSGV))
    logits_BHTS = cap_logits(torch.einsum("bthd,bshd->bhts", attn_q_BTHD, k_BSHD) * scale, softcap)
    hidden_B1TS = ~visible_BTS[:, None]
    dense_BHTS, gated_BHTS = (
        softmax_with_sinks(x_BHTS.masked_fill(hidden_B1TS, -torch.inf), sinks_H).nan_to_num(0)
        for x_BHTS in (logits_BHTS, logits_BHTS + log_gate_BTS[:, None])
    )
    dense_BTHV, gated_BTHV = (
        torch.einsum("bhts,bshv->bthv", p_BHTS, v_BSHV) for p_BHTS in (dense_BHTS, gated_BHTS)
    )
    dense_BTC, gated_BTC = (
        to_stream(x_BTHV, out_weight_CN, out_gate_BTN) for x_BTHV in (dense_BTHV, gated_BTHV)
    )
    norm_BT = dense_BTC.square().sum(-1)
    loss_BT = (gated_BTC - dense_BTC).square().sum(-1) / norm_BT.clamp_min(torch.finfo(norm_BT.dtype).tiny)
    return SelectionLossSteps(scores_BTS, cut_BT, log_gate_BTS, dense_BTHV, gated_BTHV, loss_BT)


def to_stream(x_BTHV: Tensor, out_weight_CN: Tensor, out_gate_BTN: Tensor | None) -> Tensor:
    """What all heads' outputs become, `[B, T, C]`."""
    x_BTN = x_BTHV.flatten(2)
    return (x_BTN if out_gate_BTN is None else x_BTN * out_gate_BTN) @ out_weight_CN.T


def _score_at_the_cut(scores_BTS: Tensor, visible_BTS: Tensor, topk: int) -> Tensor:
    """Mean of the scores ranked k/2 to 3k/2; of those that there are, and -inf where all keys are kept."""
    n_keys = scores_BTS.shape[-1]
    ranked_BTS = scores_BTS.masked_fill(~visible_BTS, -torch.inf).sort(-1, descending=True).values
    rank_S = torch.arange(n_keys, device=scores_BTS.device)
    visible_BT1 = visible_BTS.sum(-1, keepdim=True)
    near_BTS = (rank_S >= topk - topk // 2) & (rank_S < topk + topk // 2 + topk % 2) & (rank_S < visible_BT1)
    mean_BT = ranked_BTS.masked_fill(~near_BTS, 0).sum(-1) / near_BTS.sum(-1).clamp_min(1)
    return torch.where(visible_BT1[..., 0] > topk, mean_BT, mean_BT.new_tensor(-torch.inf))


@implements("selection_loss", "reference")
def reference_selection_loss(*inputs: Any) -> Tensor:
    """The result alone."""
    return selection_loss_reference(*inputs).loss_BT
