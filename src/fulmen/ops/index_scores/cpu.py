"""Index scores in blocks of queries and tiles of keys; plain torch, any device.

Bits: a score depends on its query and key alone, not on the batch, the interval or how many queries come
together, as far as the matrix product allows. Products of fewer than 4 rows (or 16 columns) go through other
kernels, which add in another order; so rows are padded to a multiple of 4 and keys to a multiple of 16
(measured on x86 with MKL, float32, 1 to 8 threads: then all agree bit for bit, else decoding differs from
prefill). No sum runs over an axis whose neighbours could change the order of addition.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from fulmen.ops.precision import math_dtype
from fulmen.ops.tiles import interval_blocks, take_keys

PRODUCT_ROWS = 4
PRODUCT_COLUMNS = 16
# Numbers in one tile of keys, and in the logits of one block (J heads x queries x tile). Measured on a core:
# for bfloat16, whose keys become float32 here, a tile that fits the level 2 cache is 3 to 6 times faster than
# all 32 K or 128 K keys at once.
INDEX_TILE_NUMBERS = 2**17
INDEX_BLOCK_LOGITS = 2**20


def index_scores_blocked(
    q_BTJE: Tensor,
    k_BSIE: Tensor,
    w_BTJ: Tensor,
    b_BTJ: Tensor | None,
    start_BT: Tensor,
    stop_BT: Tensor,
) -> Tensor:
    """See `fulmen.ops.index_scores.index_scores`."""
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
    return max(INDEX_BLOCK_LOGITS // (heads * _index_tile_width(k_BSIE)), 1)


def score_keys(q_TJE: Tensor, k_CIE: Tensor, w_TJ: Tensor, b_TJ: Tensor | None) -> Tensor:
    """`[T, C]`, the scores of some queries for some keys; none hidden. Differentiable by plain autograd."""
    dtype = math_dtype(q_TJE.dtype)
    queries, heads, width = q_TJE.shape
    n_groups = k_CIE.shape[1]
    shared = heads // n_groups
    more = -queries % (PRODUCT_ROWS // math.gcd(PRODUCT_ROWS, shared))

    def rows_by_key_head(x_TJE: Tensor) -> Tensor:
        padded_TJE = pad(x_TJE.to(dtype), (0, 0, 0, 0, 0, more)) if more else x_TJE.to(dtype)
        return padded_TJE.unflatten(1, (n_groups, shared)).transpose(0, 1).flatten(1, 2)

    q_IRE = rows_by_key_head(q_TJE) * width**-0.5
    w_X1J = rows_by_key_head(w_TJ[..., None]).reshape(-1, 1, shared)
    b_IR1 = None if b_TJ is None else rows_by_key_head(b_TJ[..., None])
    tiles = [
        _score_tile(q_IRE, take_keys(tile_CIE, slice(None), dtype), w_X1J, b_IR1)
        for tile_CIE in k_CIE.split(_index_tile_width(k_CIE))
    ]
    return torch.cat(tiles, -1)[:queries]


def _score_tile(q_IRE: Tensor, k_ICE: Tensor, w_X1J: Tensor, b_IR1: Tensor | None) -> Tensor:
    """Scores `[T, C]`; R is T * J/I, and X is I * T, so that each matrix of X holds the heads of one sum."""
    n_groups, n_keys, _ = k_ICE.shape
    if missing := -n_keys % PRODUCT_COLUMNS:
        k_ICE = pad(k_ICE, (0, 0, 0, missing))
    k_IEC = k_ICE.transpose(1, 2)
    logits_IRC = torch.bmm(q_IRE, k_IEC) if b_IR1 is None else torch.baddbmm(b_IR1, q_IRE, k_IEC)
    relu_XJC = logits_IRC.relu_().view(*w_X1J.shape[::2], k_IEC.shape[-1])
    first_TC, *others_TC = torch.bmm(w_X1J, relu_XJC).squeeze(1).chunk(n_groups)
    for more_TC in others_TC:
        first_TC = first_TC + more_TC
    return first_TC[:, :n_keys]


def _index_tile_width(k_SIE: Tensor) -> int:
    columns = INDEX_TILE_NUMBERS // (k_SIE.shape[-2] * k_SIE.shape[-1])
    return max(columns // PRODUCT_COLUMNS, 1) * PRODUCT_COLUMNS
