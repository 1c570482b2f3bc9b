"""How the blocked operations cut their work: query rows into blocks, the keys of a block into tiles.

A block is some query rows of one batch row. Batch rows are never mixed, so that a sequence gives the same
bits alone and in a batch, and each block reads only the keys that some row of it sees.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fulmen.ops.common.intervals import interval_mask

# Numbers in one tile of keys. Measured for one query, float32 and bfloat16, 1 MB of level 2 cache for a core:
# 2**19 is fastest or within 5 %, 2**17 costs up to a third more, and bfloat16 suffers above (float32 copies).
TILE_NUMBERS = 2**19
# Queries that a block of a loss has at least, whatever its size: each block copies all keys, and adds to the
# gradients of all. Measured at 32 K keys: 32 rows take half of the time of 7, which 2**21 numbers would be.
LEAST_LOSS_ROWS = 32


class KeyTile(NamedTuple):
    """Keys that a block of queries reads together.

    Attributes:
        keys: positions, distinct; a slice or int64 indices.
        hidden_TS: which query must not see which of them; None if every query sees all.
    """

    keys: slice | Tensor
    hidden_TS: Tensor | None


class IntervalBlock(NamedTuple):
    """Query rows and their keys.

    Attributes:
        rows: the queries.
        first, last: the hull first <= s < last of their intervals.
        start_T, stop_T: their intervals, clipped to the keys there are.
        visible_to_all: the interval of keys that every row sees; empty if its end is not above its start.
        most_keys: the longest of their intervals.
    """

    rows: slice
    first: int
    last: int
    start_T: Tensor
    stop_T: Tensor
    visible_to_all: tuple[int, int]
    most_keys: int

    def tiles(self, width: int) -> Iterator[KeyTile]:
        """The hull in tiles of at most `width` keys."""
        for low in range(self.first, self.last, width):
            yield self.tile(low, min(low + width, self.last))

    def tile(self, low: int, high: int) -> KeyTile:
        """The keys low <= s < high."""
        if self.visible_to_all[0] <= low and high <= self.visible_to_all[1]:
            return KeyTile(slice(low, high), None)
        return KeyTile(slice(low, high), ~interval_mask(self.start_T, self.stop_T, high - low, low))


def interval_blocks(start_T: Tensor, stop_T: Tensor, n_keys: int, n_rows: int) -> Iterator[IntervalBlock]:
    """Blocks of `n_rows` queries; a block in which no query sees a key is left out."""
    start_T, stop_T = start_T.clamp(0, n_keys), stop_T.clamp(0, n_keys)
    starts, stops = start_T.tolist(), stop_T.tolist()
    for low in range(0, len(starts), n_rows):
        rows = slice(low, min(low + n_rows, len(starts)))
        pairs = list(zip(starts[rows], stops[rows], strict=True))
        not_empty = [(start, stop) for start, stop in pairs if start < stop]
        if not_empty:
            yield IntervalBlock(
                rows,
                first=min(start for start, _ in not_empty),
                last=max(stop for _, stop in not_empty),
                start_T=start_T[rows],
                stop_T=stop_T[rows],
                visible_to_all=(max(start for start, _ in pairs), min(stop for _, stop in pairs)),
                most_keys=max(stop - start for start, stop in not_empty),
            )


def selected_tile(topk_TK: Tensor, n_keys: int) -> KeyTile:
    """The union of the queries' selected keys (possibly none); negative indices are nothing."""
    return KeyTile(*_union_of_selected(topk_TK, n_keys))


def selected_tiles(topk_TK: Tensor, n_keys: int, width: int) -> Iterator[KeyTile]:
    """`selected_tile` in tiles of at most `width` keys."""
    keys_U, hidden_TU = _union_of_selected(topk_TK, n_keys)
    for low in range(0, len(keys_U), width):
        high = min(low + width, len(keys_U))
        yield KeyTile(keys_U[low:high], None if hidden_TU is None else hidden_TU[:, low:high])


def _union_of_selected(topk_TK: Tensor, n_keys: int) -> tuple[Tensor, Tensor | None]:
    if len(topk_TK) == 1:
        return topk_TK[topk_TK >= 0].long(), None
    columns_TK = topk_TK.long().masked_fill(topk_TK < 0, n_keys)
    member_S = torch.zeros(n_keys + 1, dtype=torch.bool, device=topk_TK.device)
    member_S[columns_TK.flatten()] = True
    member_S[n_keys] = False
    union_U = member_S.nonzero().squeeze(1)
    # Column of each key within the union; nothing goes into one column more, which is then cut off.
    column_S = member_S.cumsum(0) - 1
    column_S[n_keys] = len(union_U)
    hidden_TU = torch.ones(len(topk_TK), len(union_U) + 1, dtype=torch.bool, device=topk_TK.device)
    return union_U, hidden_TU.scatter_(1, column_S[columns_TK], False)[:, :-1]


def take_keys(x_SGD: Tensor, keys: slice | Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of the rows `keys` as `[G, C, D]` in `dtype`, in the memory order of `x_SGD`.

    Copied even where a view would do: a tile that was streamed into the cache once is read faster by a matrix
    product with few rows than the original is (measured: 2 times from 32 K keys on, 1.4 times slower at 8 K).
    """
    if isinstance(keys, slice):
        return x_SGD[keys].to(dtype, copy=True).transpose(0, 1)
    if (x_GSD := x_SGD.transpose(0, 1)).is_contiguous():
        # As Transformers caches keep them: 4 times faster this way, and 100 times slower if not contiguous.
        return x_GSD.index_select(1, keys).to(dtype)
    return x_SGD.index_select(0, keys).to(dtype).transpose(0, 1)


def zero_bad_keys(x_GCD: Tensor) -> tuple[Tensor, Tensor | None]:
    """`x_GCD` with every key that is not finite set to zero, and bool `[C]` which ones (None: all finite).

    In a matrix product a hidden key still counts as 0 times itself, and 0 * NaN is NaN: so bad keys are
    taken out, and the caller writes NaN into the scores of those that do see them.
    """
    # An overflow of the sum costs one needless look at the parts.
    if torch.isfinite(x_GCD.sum()):
        return x_GCD, None
    bad_C = ~torch.isfinite(x_GCD).all(-1).all(0)
    return x_GCD.masked_fill(bad_C[:, None], 0), bad_C
