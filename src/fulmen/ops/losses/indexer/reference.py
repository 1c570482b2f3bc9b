"""The indexer's loss, the specification: KL(p || softmax(I)) with p the mean of all heads' attention."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fulmen.ops.attention.mean import over_keys
from fulmen.ops.attention.reference import attention_reference
from fulmen.ops.common.intervals import interval_mask, selection_mask
from fulmen.ops.dispatch import implements
from fulmen.ops.scores.reference import index_scores_reference


class IndexerLoss(NamedTuple):
    """Per query: the divergence, and the target's entropy, the part of the cross-entropy that always remains.

    Both in nats, float32 (float64 for float64 inputs), 0 for a query without keys.
    """

    kl_BT: Tensor
    target_entropy_BT: Tensor


class IndexerLossReference(NamedTuple):
    """Every intermediate: target p and log softmax(I) are 0 where the key is not in the set."""

    visible_BTS: Tensor
    target_BTS: Tensor
    scores_BTS: Tensor
    log_index_BTS: Tensor
    loss: IndexerLoss


def indexer_loss_reference(
    q_BTJE: Tensor,
    k_BSIE: Tensor,
    w_BTJ: Tensor,
    b_BTJ: Tensor | None,
    attn_q_BTHD: Tensor,
    attn_k_BSGD: Tensor,
    start_BT: Tensor,
    stop_BT: Tensor,
    scale: float,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
) -> IndexerLossReference:
    """See `fulmen.ops.losses.indexer.indexer_loss`."""
    visible_BTS = interval_mask(start_BT, stop_BT, k_BSIE.shape[1])
    return _indexer_loss_over(
        visible_BTS, q_BTJE, k_BSIE, w_BTJ, b_BTJ, attn_q_BTHD, attn_k_BSGD, scale, softcap, sinks_H
    )


def indexer_loss_selected_reference(
    q_BTJE: Tensor,
    k_BSIE: Tensor,
    w_BTJ: Tensor,
    b_BTJ: Tensor | None,
    attn_q_BTHD: Tensor,
    attn_k_BSGD: Tensor,
    topk_BTK: Tensor,
    scale: float,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
) -> IndexerLossReference:
    """See `fulmen.ops.losses.indexer.indexer_loss_selected`."""
    visible_BTS = selection_mask(topk_BTK, k_BSIE.shape[1])
    return _indexer_loss_over(
        visible_BTS, q_BTJE, k_BSIE, w_BTJ, b_BTJ, attn_q_BTHD, attn_k_BSGD, scale, softcap, sinks_H
    )


def _indexer_loss_over(
    visible_BTS: Tensor,
    q_BTJE: Tensor,
    k_BSIE: Tensor,
    w_BTJ: Tensor,
    b_BTJ: Tensor | None,
    attn_q_BTHD: Tensor,
    attn_k_BSGD: Tensor,
    scale: float,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
) -> IndexerLossReference:
    with torch.no_grad():
        no_values_BSGV = attn_k_BSGD[..., :0]
        attention = attention_reference(
            attn_q_BTHD, attn_k_BSGD, no_values_BSGV, visible_BTS, scale, softcap, sinks_H
        )
        target_BTS = attention.probs_BTHS.mean(2)
        if sinks_H is not None:
            target_BTS = over_keys(target_BTS)
        entropy_BT = -torch.xlogy(target_BTS, target_BTS).sum(-1)
    everything = torch.zeros(visible_BTS.shape[:2], dtype=torch.long, device=visible_BTS.device)
    scores_BTS = index_scores_reference(
        q_BTJE, k_BSIE, w_BTJ, b_BTJ, everything, everything + k_BSIE.shape[1]
    ).scores_BTS
    # A finite stand-in for -inf keeps rows without keys, and 0 * log 0, free of NaN.
    hidden_BTS = ~visible_BTS
    lowest = torch.finfo(scores_BTS.dtype).min
    log_index_BTS = scores_BTS.masked_fill(hidden_BTS, lowest).log_softmax(-1).masked_fill(hidden_BTS, 0)
    kl_BT = -(target_BTS * log_index_BTS).sum(-1) - entropy_BT
    return IndexerLossReference(
        visible_BTS, target_BTS, scores_BTS, log_index_BTS, IndexerLoss(kl_BT, entropy_BT)
    )


@implements("indexer_loss", "reference")
def reference_indexer_loss(*inputs: Any) -> IndexerLoss:
    """The result alone."""
    return indexer_loss_reference(*inputs).loss


@implements("indexer_loss_selected", "reference")
def reference_indexer_loss_selected(*inputs: Any) -> IndexerLoss:
    """The result alone."""
    return indexer_loss_selected_reference(*inputs).loss
