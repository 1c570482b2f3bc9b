"""Dense attention in blocks of queries and tiles of keys; plain torch, any device."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from fulmen.ops.attention.blocked import AttentionBlocks, BlockedAttention, attention_block_size
from fulmen.ops.common.opaque import SavedTensors
from fulmen.ops.common.tiles import KeyTile, interval_blocks
from fulmen.ops.dispatch import implements


def dense_gradients_blocked(
    dout_BTHV: Tensor,
    dlse_BTH: Tensor,
    q_BTHD: Tensor,
    k_BSGD: Tensor,
    v_BSGV: Tensor,
    start_BT: Tensor,
    stop_BT: Tensor,
    out_BTHV: Tensor,
    lse_BTH: Tensor,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq_BTHD, dk_BSGD and dv_BSGV."""
    # As in CppDenseAttention, whose lse no value makes NaN.
    marked_BTH = lse_BTH.masked_fill(out_BTHV.isnan().any(-1), torch.nan)
    blocks = visible_blocks(q_BTHD, k_BSGD, start_BT, stop_BT)
    numbers = {"scale": scale, "softcap": softcap}
    saved = SavedTensors(q_BTHD, k_BSGD, v_BSGV, out_BTHV, marked_BTH, **numbers, blocks=blocks)
    backward: Any = BlockedAttention.backward
    return backward(saved, dout_BTHV, dlse_BTH)[:3]


@implements("dense_attention", "torch", gradients=dense_gradients_blocked)
def dense_attention_blocked(
    q_BTHD: Tensor,
    k_BSGD: Tensor,
    v_BSGV: Tensor,
    start_BT: Tensor,
    stop_BT: Tensor,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """See `fulmen.ops.attention.dense.dense_attention`."""
    blocks = visible_blocks(q_BTHD, k_BSGD, start_BT, stop_BT)
    return BlockedAttention.apply(q_BTHD, k_BSGD, v_BSGV, scale, softcap, blocks)


def visible_blocks(q_BTHD: Tensor, k_BSGD: Tensor, start_BT: Tensor, stop_BT: Tensor) -> AttentionBlocks:
    """Blocks of queries, each with the hull of its intervals."""
    n_rows, width = attention_block_size(q_BTHD, k_BSGD)

    def blocks(b: int) -> Iterator[tuple[slice, Iterable[KeyTile]]]:
        for block in interval_blocks(start_BT[b], stop_BT[b], k_BSGD.shape[1], n_rows):
            yield block.rows, block.tiles(width)

    return blocks
