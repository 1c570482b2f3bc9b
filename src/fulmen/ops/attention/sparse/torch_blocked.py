"""Sparse attention: blocks of queries over the gathered union of their keys; plain torch, any device.

Why the union, and not each query's own keys: neighbouring queries share most of their selection, and a
matrix product with many rows pays even for keys that only some rows want. Measured against gathering for each
query (float32 and bfloat16, one core, 9/3 and 32/8 heads, K = 256 to 2048, S = 2 K to 32 K) with half of each
selection drawn at random, the union's worst case: from 1.4 times slower (512 of 32 K) to 2 times faster. It
gains further as queries select alike. A single query is its own union.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from fulmen.ops.attention.blocked import AttentionBlocks, BlockedAttention, attention_block_size
from fulmen.ops.common.opaque import SavedTensors
from fulmen.ops.common.tiles import KeyTile, selected_tiles
from fulmen.ops.dispatch import implements


def sparse_gradients_blocked(
    dout_BTHV: Tensor,
    dlse_BTH: Tensor,
    q_BTHD: Tensor,
    k_BSGD: Tensor,
    v_BSGV: Tensor,
    topk_BTK: Tensor,
    out_BTHV: Tensor,
    lse_BTH: Tensor,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq_BTHD, dk_BSGD and dv_BSGV."""
    numbers = {"scale": scale, "softcap": softcap}
    blocks = selected_blocks(q_BTHD, k_BSGD, topk_BTK)
    saved = SavedTensors(q_BTHD, k_BSGD, v_BSGV, out_BTHV, lse_BTH, **numbers, blocks=blocks)
    backward: Any = BlockedAttention.backward
    return backward(saved, dout_BTHV, dlse_BTH)[:3]


@implements("sparse_attention", "torch", gradients=sparse_gradients_blocked)
def sparse_attention_blocked(
    q_BTHD: Tensor,
    k_BSGD: Tensor,
    v_BSGV: Tensor,
    topk_BTK: Tensor,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """See `fulmen.ops.attention.sparse.sparse_attention`."""
    blocks = selected_blocks(q_BTHD, k_BSGD, topk_BTK)
    return BlockedAttention.apply(q_BTHD, k_BSGD, v_BSGV, scale, softcap, blocks)


def selected_blocks(q_BTHD: Tensor, k_BSGD: Tensor, topk_BTK: Tensor) -> AttentionBlocks:
    """Blocks of queries, each with the union of its keys."""
    n_keys = k_BSGD.shape[1]
    n_rows, width = attention_block_size(q_BTHD, k_BSGD)

    def blocks(b: int) -> Iterator[tuple[slice, Iterable[KeyTile]]]:
        for low in range(0, topk_BTK.shape[1], n_rows):
            rows = slice(low, min(low + n_rows, topk_BTK.shape[1]))
            yield rows, selected_tiles(topk_BTK[b, rows], n_keys, width)

    return blocks
