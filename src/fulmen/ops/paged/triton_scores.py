"""Index scores straight from packed int8 rows of a paged cache, by block table.

Keys are widened in registers, where their codes are exact in bfloat16, and their scales multiply the
products. A row is read as 16-bit words, each two neighbouring codes: a head's bytes begin at an even address,
and at no better one. So the matrix product has two halves, of the even dims and of the odd ones.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fulmen.ops.common.index_keys import SCALE_BYTES
from fulmen.ops.paged.requests import Requests
from fulmen.ops.paged.triton_blocks import request_of, requests_held, rows_of, tiles_of
from fulmen.ops.triton_kit import (
    SMALLEST_PRODUCT,
    compile_options,
    kernel_sizes,
    launch,
    power_of_2,
    product,
    product_dtype,
)

# Programs that fill any GPU of today several times over.
ENOUGH_PROGRAMS = 2048


def launch_paged_scores(
    q_TJE: Tensor,
    w_TJ: Tensor,
    b_TJ: Tensor,
    packed_RX: Tensor,
    requests: Requests,
    rows_per_block: int,
    tokens: slice,
    more_than: int,
    scores_TS: Tensor,
) -> None:
    """Write scores of the keys that a query sees, if these are `more_than` so many, and no others.

    Args:
        q_TJE, w_TJ, b_TJ: contiguous, of all tokens; packed_RX: I * (E + 2) bytes a row.
        scores_TS: float32, of the tokens `tokens` alone; S is at least `requests.most_keys`.
    """
    heads, width = q_TJE.shape[1:]
    n_key_heads = packed_RX.shape[1] // (width + SCALE_BYTES)
    block_queries, tiles = score_tiles(heads // n_key_heads, width, requests.most_queries)
    first_tile, n_tiles = tiles_of(tokens.start, tokens.stop, requests.count, block_queries)
    n_key_tiles = triton.cdiv(requests.most_keys, tiles["BLOCK_KEYS"])
    n_splits = min(n_key_tiles, triton.cdiv(ENOUGH_PROGRAMS, n_tiles))
    words_RW = packed_RX.view(torch.int16)
    launch(
        *(_paged_scores_kernel, (n_tiles, n_splits), q_TJE, w_TJ, b_TJ, words_RW, requests.block_BN),
        *(requests.start_Z, requests.length_B, scores_TS, words_RW.stride(0), requests.block_BN.stride(0)),
        *(scores_TS.stride(0), rows_per_block, requests.count, first_tile, tokens.start, tokens.stop),
        *(more_than, width**-0.5),
        KEY_HEADS=n_key_heads,
        PAGE=requests.block_size,
        BLOCK_REQUESTS=requests_held(requests.count),
        DTYPE=product_dtype(q_TJE),
        **tiles,
    )


def score_tiles(shared: int, width: int, most_queries: int) -> tuple[int, dict[str, Any]]:
    """Queries of a tile, and how the kernel is cut and compiled for `shared` index heads a key head."""
    block_heads = power_of_2(shared)
    few = power_of_2(most_queries) * block_heads <= SMALLEST_PRODUCT
    sizes = kernel_sizes("paged_scores_few" if few else "paged_scores")
    # Of a query alone the other rows of a product are empty.
    block_queries = max(sizes["rows"] // block_heads, 1)
    return block_queries, {
        "SHARED": shared,
        "WIDTH": width,
        "BLOCK_QUERIES": block_queries,
        "BLOCK_HEADS": block_heads,
        "BLOCK_KEYS": sizes["columns"],
        "BLOCK_WORDS": SMALLEST_PRODUCT,
        **compile_options(sizes),
    }


@triton.jit(do_not_specialize=["n_requests", "first_tile", "first", "end", "more_than"])
def _paged_scores_kernel(
    q_TJE,
    w_TJ,
    b_TJ,
    words_RW,
    block_BN,
    start_Z,
    length_B,
    scores_TS,
    row_stride,
    block_stride,
    scores_stride,
    rows_per_block,
    n_requests,
    first_tile,
    first,
    end,
    more_than,
    scale,
    KEY_HEADS: tl.constexpr,
    SHARED: tl.constexpr,
    WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_REQUESTS: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    request, token, n_left, stop = request_of(
        start_Z, length_B, first_tile + tl.program_id(0), n_requests, BLOCK_QUERIES, BLOCK_REQUESTS
    )
    query_T = tl.arange(0, BLOCK_QUERIES)
    token_T = token + query_T
    wanted_T = (query_T < n_left) & (token_T >= first) & (token_T < end) & (stop + query_T > more_than)
    stop_T = tl.where(wanted_T, stop + query_T, 0)
    # R: pairs of a query and one of the heads that share an index key head
    pair_R = tl.arange(0, BLOCK_QUERIES * BLOCK_HEADS)
    query_R = pair_R // BLOCK_HEADS
    token_R = token + query_R
    present_R = (query_R < n_left) & (token_R >= first) & (token_R < end) & (stop + query_R > more_than)
    present_R &= pair_R % BLOCK_HEADS < SHARED
    head_R = token_R.to(tl.int64) * (KEY_HEADS * SHARED) + pair_R % BLOCK_HEADS
    row_T = scores_TS + (token_T - first).to(tl.int64) * scores_stride
    n_seen = tl.max(stop_T, 0)
    for low in range(tl.program_id(1) * BLOCK_KEYS, n_seen, tl.num_programs(1) * BLOCK_KEYS):
        key_S = low + tl.arange(0, BLOCK_KEYS)
        present_S = key_S < n_seen
        row_S = rows_of(block_BN + request * block_stride, key_S, present_S, rows_per_block, PAGE)
        scores_QS = tl.zeros([BLOCK_QUERIES, BLOCK_KEYS], tl.float32)
        for key_head in range(KEY_HEADS):
            weighted_RS = _weighted(
                *(q_TJE, w_TJ, b_TJ, head_R + key_head * SHARED, present_R),
                *(words_RW + key_head * (WIDTH // 2 + 1), row_S * row_stride, present_S, scale),
                *(WIDTH, BLOCK_WORDS, DTYPE),
            )
            scores_QS += tl.sum(tl.reshape(weighted_RS, [BLOCK_QUERIES, BLOCK_HEADS, BLOCK_KEYS]), 1)
        tl.store(row_T[:, None] + key_S[None, :], scores_QS, mask=key_S[None, :] < stop_T[:, None])


@triton.jit
def _weighted(
    q_TJE,
    w_TJ,
    b_TJ,
    head_R,
    present_R,
    words_W,
    offset_S,
    present_S,
    scale,
    WIDTH: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Of one index key head: w * ReLU(q . k * scale + b) of all its pairs of a query and a head."""
    sums_RS = tl.zeros([head_R.shape[0], offset_S.shape[0]], tl.float32)
    # By few words at a time: of all of them the addresses alone would take the registers.
    for first in tl.static_range(0, WIDTH // 2, BLOCK_WORDS):
        column_W = first + tl.arange(0, BLOCK_WORDS)
        inside_W = column_W < WIDTH // 2
        place_RW = head_R[:, None] * WIDTH + 2 * column_W[None, :]
        inside_RW = present_R[:, None] & inside_W[None, :]
        even_RW = _finite_or_nan(tl.load(q_TJE + place_RW, mask=inside_RW, other=0.0), DTYPE)
        odd_RW = _finite_or_nan(tl.load(q_TJE + place_RW + 1, mask=inside_RW, other=0.0), DTYPE)
        words_SW = words_W + offset_S[:, None] + column_W[None, :]
        word_SW = tl.load(words_SW, mask=present_S[:, None] & inside_W[None, :], other=0)
        low_SW = ((word_SW << 8) >> 8).to(tl.float32).to(DTYPE)
        high_SW = (word_SW >> 8).to(tl.float32).to(DTYPE)
        sums_RS += product(even_RW, tl.trans(low_SW)) + product(odd_RW, tl.trans(high_SW))
    bits_S = tl.load(words_W + offset_S + WIDTH // 2, mask=present_S, other=0).to(tl.int32)
    scale_S = (bits_S << 16).to(tl.float32, bitcast=True)
    logits_RS = sums_RS * scale_S[None, :] * scale
    logits_RS += tl.load(b_TJ + head_R, mask=present_R, other=0.0).to(tl.float32)[:, None]
    # Written so that NaN stays NaN.
    relu_RS = tl.where(logits_RS < 0, 0.0, logits_RS)
    weight_R = tl.load(w_TJ + head_R, mask=present_R, other=0.0).to(tl.float32)
    return tl.where(present_R[:, None], relu_RS * weight_R[:, None], 0.0)


@triton.jit
def _finite_or_nan(q, DTYPE: tl.constexpr):
    """A query that is not finite scores NaN."""
    q = q.to(tl.float32)
    return tl.where(tl.abs(q) == float("inf"), float("nan"), q).to(DTYPE)
