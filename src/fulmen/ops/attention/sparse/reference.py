"""Sparse attention, the specification: the selected keys are visible, the same ones for all heads."""

from torch import Tensor

from fulmen.ops.attention.reference import AttentionReference, attention_reference
from fulmen.ops.common.intervals import selection_mask


def sparse_attention_reference(
    q_BTHD: Tensor, k_BSGD: Tensor, v_BSGV: Tensor, topk_BTK: Tensor, scale: float
) -> AttentionReference:
    """See `fulmen.ops.attention.sparse.sparse_attention`."""
    visible_BTS = selection_mask(topk_BTK, k_BSGD.shape[1])
    return attention_reference(q_BTHD, k_BSGD, v_BSGV, visible_BTS, scale)
