"""Dense attention, the specification: every key of the interval is visible."""

from torch import Tensor

from fulmen.ops.attention.reference import AttentionReference, attention_reference
from fulmen.ops.common.intervals import interval_mask


def dense_attention_reference(
    q_BTHD: Tensor, k_BSGD: Tensor, v_BSGV: Tensor, start_BT: Tensor, stop_BT: Tensor, scale: float
) -> AttentionReference:
    """See `fulmen.ops.attention.dense.dense_attention`."""
    visible_BTS = interval_mask(start_BT, stop_BT, k_BSGD.shape[1])
    return attention_reference(q_BTHD, k_BSGD, v_BSGV, visible_BTS, scale)
