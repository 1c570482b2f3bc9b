"""Index scores in blocks of queries and tiles of keys; plain torch, any device.

Bits: a score depends on its query and key alone, not on the batch, the interval or how many queries come
together, as far as the matrix product allows. Products of fewer than 4 rows (or 16 columns) go through other
kernels, which add in another order; so rows are padded to a multiple of 4 and keys to a multiple of 16
(measured on x86 with MKL, float32, 1, 2 and 4 threads: then all agree bit for bit, else decoding differs
from prefill). No sum runs over an axis whose neighbours could change the order of addition.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from fulmen.ops.common.index_keys import is_packed, unpack_index_keys
from fulmen.ops.common.precision import math_dtype, nan_for_infinity
from fulmen.ops.common.tiles import TILE_NUMBERS, interval_blocks, take_keys
from fulmen.ops.dispatch import implements

PRODUCT_ROWS = 4
PRODUCT_COLUMNS = 16
# Numbers in the logits of one tile (J heads x queries x keys). Measured: no gain above, 2**18 is 20 % slower.
INDEX_TILE_LOGITS = 500_000
# But no tile is narrower than this many times PRODUCT_COLUMNS.
NARROWEST_TILE = 16


@implements("index_scores", "torch")
def index_scores_blocked(
    q_BTJE: Tensor,
    k_BSIE: Tensor,
    w_BTJ: Tensor,
    b_BTJ: Tensor | None,
    start_BT: Tensor,
    stop_BT: Tensor,
) -> Tensor:
    """See `fulmen.ops.scores.index_scores`."""
    batch, queries, heads, _ = q_BTJE.shape
    n_keys = k_BSIE.shape[1]
    scores_BTS = torch.full(
        (batch, queries, n_keys), -torch.inf, dtype=math_dtype(q_BTJE.dtype), device=q_BTJE.device
    )
    for b in range(batch):
        for block in interval_blocks(start_BT[b], stop_BT[b], n_keys, index_block_rows(heads, k_BSIE)):
            tile = block.tile(block.first, block.last)
            q_TJE, w_TJ = q_BTJE[b, block.rows], w_BTJ[b, block.rows]
            b_TJ = None if b_BTJ is None else b_BTJ[b, block.rows]
            scores_TS = score_keys(q_TJE, k_BSIE[b, tile.keys], w_TJ, b_TJ)
            if tile.hidden_TS is not None:
                scores_TS.masked_fill_(tile.hidden_TS, -torch.inf)
            scores_BTS[b, block.rows, tile.keys] = scores_TS
    return scores_BTS


def index_block_rows(heads: int, k_BSIE: Tensor) -> int:
    """Queries of a block, such that the logits of one tile of keys stay small."""
    n_keys = min(_index_tile_width(k_BSIE, n_rows=1), max(k_BSIE.shape[1], 1))
    return max(INDEX_TILE_LOGITS // (heads * n_keys), 1)


def score_keys(q_TJE: Tensor, k_CIE: Tensor, w_TJ: Tensor, b_TJ: Tensor | None) -> Tensor:
    """`[T, C]`, the scores of some queries for some keys; none hidden. Differentiable by plain autograd."""
    dtype = math_dtype(q_TJE.dtype)
    n_groups = k_CIE.shape[1]
    q_IRE = _rows_by_key_head(nan_for_infinity(q_TJE).to(dtype) * q_TJE.shape[-1] ** -0.5, n_groups)
    b_IR1 = None if b_TJ is None else _rows_by_key_head(b_TJ.to(dtype)[..., None], n_groups)
    w_X1J = w_TJ.to(dtype).unflatten(1, (n_groups, 1, -1)).transpose(0, 1).flatten(0, 1)
    tiles = [
        _score_tile(q_IRE, _take_index_keys(tile_CIE, dtype), w_X1J, b_IR1)
        for tile_CIE in k_CIE.split(_index_tile_width(k_CIE, n_rows=w_TJ.numel()))
    ]
    return torch.cat(tiles, -1)


def _take_index_keys(k_CIE: Tensor, dtype: torch.dtype) -> Tensor:
    """`[I, C, E]` in `dtype`."""
    if is_packed(k_CIE):
        return unpack_index_keys(k_CIE, dtype).transpose(0, 1)
    return take_keys(k_CIE, slice(None), dtype)


def _score_tile(q_IRE: Tensor, k_ICE: Tensor, w_X1J: Tensor, b_IR1: Tensor | None) -> Tensor:
    """Scores `[T, C]`. R is T * J/I, the heads that share an index key head in one product; X is I * T."""
    n_rows, n_keys = q_IRE.shape[1], k_ICE.shape[1]
    q_IRE, k_ICE = _pad_rows(q_IRE, PRODUCT_ROWS), _pad_rows(k_ICE, PRODUCT_COLUMNS)
    if b_IR1 is None:
        logits_IRC = torch.bmm(q_IRE, k_ICE.transpose(1, 2))
    else:
        logits_IRC = torch.baddbmm(_pad_rows(b_IR1, PRODUCT_ROWS), q_IRE, k_ICE.transpose(1, 2))
    relu_XJC = logits_IRC.relu_()[:, :n_rows].reshape(*w_X1J.shape[::2], k_ICE.shape[1])
    first_TC, *others_TC = torch.bmm(w_X1J, relu_XJC).squeeze(1).chunk(len(k_ICE))
    for more_TC in others_TC:
        first_TC = first_TC + more_TC
    return first_TC[:, :n_keys]


def _rows_by_key_head(x_TJE: Tensor, n_groups: int) -> Tensor:
    """`[T, J, E]` to `[I, T * J/I, E]`."""
    return x_TJE.unflatten(1, (n_groups, -1)).transpose(0, 1).flatten(1, 2)


def _pad_rows(x_IRE: Tensor, multiple: int) -> Tensor:
    missing = -x_IRE.shape[1] % multiple
    return pad(x_IRE, (0, 0, 0, missing)) if missing else x_IRE


def _index_tile_width(k_SIE: Tensor, n_rows: int) -> int:
    """Keys of a tile for `n_rows` rows of logits."""
    by_keys = TILE_NUMBERS // (k_SIE.shape[-2] * k_SIE.shape[-1])
    by_logits = INDEX_TILE_LOGITS // max(n_rows, 1)
    return max(min(by_keys, by_logits) // PRODUCT_COLUMNS, NARROWEST_TILE) * PRODUCT_COLUMNS
