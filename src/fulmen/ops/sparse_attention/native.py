"""Sparse attention by the native kernel: each query gathers its own keys."""

from torch import Tensor

from fulmen.ops.attention_native import NativeAttention
from fulmen.ops.sparse_attention.cpu import selected_blocks


def sparse_attention_native(
    q_BTHD: Tensor, k_BSGD: Tensor, v_BSGV: Tensor, topk_BTK: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """See `fulmen.ops.sparse_attention.sparse_attention`."""
    blocks = selected_blocks(q_BTHD, k_BSGD, topk_BTK)
    return NativeAttention.apply(q_BTHD, k_BSGD, v_BSGV, scale, blocks, (topk_BTK, None, None))
