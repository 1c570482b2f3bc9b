"""Dense attention in blocks of queries and tiles of keys; plain torch, any device."""

from collections.abc import Iterable, Iterator

from torch import Tensor

from fulmen.ops.attention.blocked import AttentionBlocks, BlockedAttention, attention_block_size
from fulmen.ops.common.tiles import KeyTile, interval_blocks


def dense_attention_blocked(
    q_BTHD: Tensor, k_BSGD: Tensor, v_BSGV: Tensor, start_BT: Tensor, stop_BT: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """See `fulmen.ops.attention.dense.dense_attention`."""
    blocks = visible_blocks(q_BTHD, k_BSGD, start_BT, stop_BT)
    return BlockedAttention.apply(q_BTHD, k_BSGD, v_BSGV, scale, blocks)


def visible_blocks(q_BTHD: Tensor, k_BSGD: Tensor, start_BT: Tensor, stop_BT: Tensor) -> AttentionBlocks:
    """Blocks of queries, each with the hull of its intervals."""
    n_rows, width = attention_block_size(q_BTHD, k_BSGD)

    def blocks(b: int) -> Iterator[tuple[slice, Iterable[KeyTile]]]:
        for block in interval_blocks(start_BT[b], stop_BT[b], k_BSGD.shape[1], n_rows):
            yield block.rows, block.tiles(width)

    return blocks
