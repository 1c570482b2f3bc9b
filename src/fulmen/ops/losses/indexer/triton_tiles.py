"""How the Triton kernels of the indexer's loss cut their work: chunks of queries, tiles of pairs and keys.

A chunk's mean attention p and index scores I are rows of columns. Over an interval column c is key c; over a
selection it is the c-th selected key. In the first case several queries share a tile of keys, in the second
each gathers its own. A tile has a row for each pair of a query and a head that reads one key head, so that no
head's scores leave the registers.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fulmen.ops.common.intervals import kernel_positions
from fulmen.ops.triton_kit import (
    SMALLEST_PRODUCT,
    compile_options,
    kernel_sizes,
    load_selected,
    power_of_2,
    product_dtype,
    split_width,
)

# Numbers of p, and of I, that are held at a time: 128 MB each.
HELD_NUMBERS = 2**25


class LossKeys(NamedTuple):
    """Which keys each query has, as the kernels read them; all int32 and contiguous.

    Attributes:
        start_BT, stop_BT: query t has the columns start <= c < stop.
        topk_BTK: the key of each column, negative: none; None: column c is key c.
        columns: how many there are, for any query.
    """

    start_BT: Tensor
    stop_BT: Tensor
    topk_BTK: Tensor | None
    columns: int

    def pointers(self) -> tuple[Tensor, Tensor, Tensor]:
        """Arguments of a kernel; the first is never read where there is no selection."""
        keys = self.start_BT if self.topk_BTK is None else self.topk_BTK
        return keys, self.start_BT, self.stop_BT


class Chunk(NamedTuple):
    """The queries first <= t < last of all batch rows."""

    first: int
    last: int


def interval_keys(start_BT: Tensor, stop_BT: Tensor, n_keys: int) -> LossKeys:
    """Those of an interval, clipped to the keys there are."""
    start_BT, stop_BT = (x.clamp(0, n_keys).int().contiguous() for x in (start_BT, stop_BT))
    return LossKeys(start_BT, stop_BT, None, n_keys)


def selected_keys(topk_BTK: Tensor) -> LossKeys:
    """Those that are selected."""
    zero_BT = torch.zeros(topk_BTK.shape[:2], dtype=torch.int32, device=topk_BTK.device)
    columns = topk_BTK.shape[2]
    return LossKeys(zero_BT, zero_BT + columns, kernel_positions(topk_BTK), columns)


def chunks_of(keys: LossKeys) -> list[Chunk]:
    """All queries, as many at a time as have HELD_NUMBERS columns."""
    batch, queries = keys.start_BT.shape
    size = max(HELD_NUMBERS // max(batch * keys.columns, 1), 1)
    return [Chunk(first, min(first + size, queries)) for first in range(0, queries, size)]


def pair_tiles(name: str, q_BTHD: Tensor, k_BSGD: Tensor, keys: LossKeys) -> dict[str, Any]:
    """How one side is cut into tiles: arguments at compile time of a kernel that calls `pairs_of`."""
    (heads, width), n_key_heads = q_BTHD.shape[2:], k_BSGD.shape[2]
    dtype = product_dtype(q_BTHD)
    # Products of float32 are no tensor cores' and take many more registers.
    sizes = kernel_sizes(name, 4 * width if dtype == tl.float32 else width)
    shared = heads // n_key_heads
    block_queries = sizes["queries"] if keys.topk_BTK is None else 1
    least = max(SMALLEST_PRODUCT // block_queries, 1)
    block_heads = min(power_of_2(shared, least), sizes["rows"] // block_queries)
    first, rest = split_width(width)
    return {
        "KEY_HEADS": n_key_heads,
        "SHARED": shared,
        "WIDTH": width,
        "BLOCK_QUERIES": block_queries,
        "BLOCK_HEADS": block_heads,
        "HEAD_BLOCKS": triton.cdiv(shared, block_heads),
        "BLOCK_KEYS": sizes["columns"],
        "BLOCK_FIRST": first,
        "BLOCK_REST": rest,
        "SELECTED": keys.topk_BTK is not None,
        "DTYPE": dtype,
        **compile_options(sizes),
    }


def grid_of_tiles(x_BRC: Tensor, tiles: dict[str, Any]) -> tuple[int, int, int]:
    """A program for each tile of a chunk; neighbours read the same keys."""
    batch, rows, columns = x_BRC.shape
    return triton.cdiv(rows, tiles["BLOCK_QUERIES"]), triton.cdiv(columns, tiles["BLOCK_KEYS"]), batch


@triton.jit
def pairs_of(
    batch,
    query,
    last_query,
    n_queries,
    head_block,
    KEY_HEADS: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    HEAD_BLOCKS: tl.constexpr,
):
    """R: pairs of a query from `query` on and one of the heads of a block that read one key head.

    Which query, which row of (batch, query, head), and whether there is such a pair.
    """
    pair_R = tl.arange(0, BLOCK_QUERIES * BLOCK_HEADS)
    query_R = query + pair_R // BLOCK_HEADS
    shared_R = head_block % HEAD_BLOCKS * BLOCK_HEADS + pair_R % BLOCK_HEADS
    row_R = (
        (batch * n_queries + query_R) * (KEY_HEADS * SHARED) + head_block // HEAD_BLOCKS * SHARED + shared_R
    )
    return query_R, row_R, (query_R < last_query) & (shared_R < SHARED)


@triton.jit
def keys_of(topk_BTK, row, low, n_columns, BLOCK: tl.constexpr, SELECTED: tl.constexpr):
    """Columns `low` <= c < `low + BLOCK`: which key, as int64, and whether there is one."""
    if SELECTED:
        key_K, there_K = load_selected(topk_BTK + row * n_columns, low, n_columns, BLOCK)
    else:
        key_K = (low + tl.arange(0, BLOCK)).to(tl.int64)
        there_K = key_K < n_columns
    return key_K, there_K


@triton.jit
def within(column_K, start_R, stop_R):
    """`[R, K]`: start <= column < stop."""
    return (column_K[None, :] >= start_R[:, None]) & (column_K[None, :] < stop_R[:, None])


@triton.jit
def inside_tile(
    start_BT, stop_BT, row, query, last_query, low, BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr
):
    """`[T, K]`: which columns from `low` on the queries `query` <= t < `last_query` have."""
    query_T = query + tl.arange(0, BLOCK_QUERIES)
    start_T = tl.load(start_BT + row + query_T, mask=query_T < last_query, other=0)
    stop_T = tl.load(stop_BT + row + query_T, mask=query_T < last_query, other=0)
    return within(low + tl.arange(0, BLOCK_KEYS), start_T, stop_T)


@triton.jit
def place_in_chunk(
    batch,
    query,
    low,
    first_query,
    last_query,
    n_columns,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """`[T, K]`: where a chunk keeps the numbers of a tile."""
    row_T = batch * (last_query - first_query) + (query - first_query) + tl.arange(0, BLOCK_QUERIES)
    return row_T[:, None] * n_columns + (low + tl.arange(0, BLOCK_KEYS))[None, :]
