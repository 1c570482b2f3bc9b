"""Dense attention by the native kernel."""

from torch import Tensor

from fulmen.ops.attention_native import NativeAttention
from fulmen.ops.dense_attention.cpu import visible_blocks


def dense_attention_native(
    q_BTHD: Tensor, k_BSGD: Tensor, v_BSGV: Tensor, start_BT: Tensor, stop_BT: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """See `fulmen.ops.dense_attention.dense_attention`."""
    blocks = visible_blocks(q_BTHD, k_BSGD, start_BT, stop_BT)
    return NativeAttention.apply(q_BTHD, k_BSGD, v_BSGV, scale, blocks, (None, start_BT, stop_BT))
