"""Index scores straight from packed int8 rows of a paged cache, by block table: of all keys, or of some.

Keys are widened in registers, where their codes are exact in bfloat16, and their scales multiply the
products. A row is read as 16-bit words, each two neighbouring codes: a head's bytes begin at an even address,
and at no better one. So the matrix product has two halves, of the even dims and of the odd ones.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fulmen.ops.common.index_keys import SCALE_BYTES
from fulmen.ops.paged.triton_blocks import Queries, is_wanted, request_of, requests_held, rows_from, rows_of
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


class PagedIndex(NamedTuple):
    """An indexer's queries and its packed keys, in their cache.

    Attributes:
        q_TJE, b_TJ: contiguous, of all tokens; w_TJ: likewise, None for weights of 1.
        packed_RX: I * (E + 2) bytes a row.
        rows_per_block: as in `Requests`.
        for_nan: what a score becomes that is not a number.
        sizes: of its kernel's tiles, in `KERNEL_SIZES`.
    """

    q_TJE: Tensor
    w_TJ: Tensor | None
    b_TJ: Tensor
    packed_RX: Tensor
    rows_per_block: int
    for_nan: float = torch.nan
    sizes: str = "paged_scores"

    @property
    def key_heads(self) -> int:
        """I."""
        return self.packed_RX.shape[1] // (self.q_TJE.shape[2] + SCALE_BYTES)

    @property
    def shared(self) -> int:
        """Heads that read one key head."""
        return self.q_TJE.shape[1] // self.key_heads

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """For a kernel; of a row the 16-bit words. What stands for no weights is not read."""
        w_TJ = self.b_TJ if self.w_TJ is None else self.w_TJ
        return self.q_TJE, w_TJ, self.b_TJ, self.packed_RX.view(torch.int16)

    @property
    def options(self) -> dict[str, Any]:
        """What kernels know of it when they are compiled."""
        return {
            "KEY_HEADS": self.key_heads,
            "SHARED": self.shared,
            "WIDTH": self.q_TJE.shape[2],
            "WEIGHTED": self.w_TJ is not None,
            "BLOCK_WORDS": SMALLEST_PRODUCT,
            "DTYPE": product_dtype(self.q_TJE),
        }


def launch_paged_scores(index: PagedIndex, queries: Queries, scores_TS: Tensor) -> None:
    """Write scores of the keys that the queries see, and no others.

    Args:
        scores_TS: float32, of the tokens `queries.tokens` alone; S is at least `queries.most_keys`.
    """
    requests = queries.requests
    block_queries, tiles = score_tiles(index.sizes, index.shared, requests.most_queries)
    n_tiles, n_key_tiles = queries.n_tiles(block_queries), triton.cdiv(queries.most_keys, tiles["BLOCK_KEYS"])
    n_splits = min(n_key_tiles, triton.cdiv(ENOUGH_PROGRAMS, n_tiles))
    tensors = index.tensors
    launch(
        *(_paged_scores_kernel, (n_tiles, n_splits), *tensors, requests.block_BN, *queries.tables, scores_TS),
        *(tensors[-1].stride(0), requests.block_BN.stride(0), scores_TS.stride(0), index.rows_per_block),
        *(*queries.numbers(block_queries), index.q_TJE.shape[2] ** -0.5, index.for_nan),
        PAGE=requests.block_size,
        BLOCK_REQUESTS=requests_held(requests.count),
        **(index.options | tiles),
    )


def launch_paged_fine(index: PagedIndex, queries: Queries, candidates_TC: Tensor, scores_TS: Tensor) -> None:
    """Write scores of each query's candidates, in their order, wherever these lie.

    Args:
        candidates_TC: int32, positions; scores_TS: float32, S at least C; both of the tokens `queries.tokens`
            alone.
    """
    requests, n_candidates = queries.requests, candidates_TC.shape[1]
    sizes = kernel_sizes("paged_fine")
    n_tiles, n_key_tiles = queries.n_tiles(1), triton.cdiv(n_candidates, sizes["columns"])
    n_splits = min(n_key_tiles, triton.cdiv(ENOUGH_PROGRAMS, n_tiles))
    tensors = index.tensors
    launch(
        *(_paged_fine_kernel, (n_tiles, n_splits), *tensors, requests.block_BN, *queries.tables),
        *(candidates_TC, scores_TS, tensors[-1].stride(0), requests.block_BN.stride(0), scores_TS.stride(0)),
        *(index.rows_per_block, *queries.numbers(1), n_candidates, index.q_TJE.shape[2] ** -0.5),
        PAGE=requests.block_size,
        BLOCK_REQUESTS=requests_held(requests.count),
        BLOCK_HEADS=power_of_2(index.shared, SMALLEST_PRODUCT),
        BLOCK_KEYS=sizes["columns"],
        **(index.options | compile_options(sizes)),
    )


def score_tiles(name: str, shared: int, most_queries: int) -> tuple[int, dict[str, Any]]:
    """Queries of a tile, and how the kernel is cut and compiled for `shared` index heads a key head."""
    block_heads = power_of_2(shared)
    few = power_of_2(most_queries) * block_heads <= SMALLEST_PRODUCT
    sizes = kernel_sizes(f"{name}_few" if few else name)
    # Of a query alone the other rows of a product are empty.
    block_queries = max(sizes["rows"] // block_heads, 1)
    return block_queries, {
        "BLOCK_QUERIES": block_queries,
        "BLOCK_HEADS": block_heads,
        # Of more heads than a tile has rows, fewer keys.
        "BLOCK_KEYS": sizes["columns"] * sizes["rows"] // (block_queries * block_heads),
        **compile_options(sizes),
    }


_LENGTHS = ["n_requests", "first_tile", "first", "end", "more_than", "at_most", "n_candidates"]


@triton.jit(do_not_specialize=_LENGTHS[:-1])
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
    at_most,
    scale,
    for_nan,
    PAGE: tl.constexpr,
    BLOCK_REQUESTS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    SHARED: tl.constexpr,
    WIDTH: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    request, token, n_left, stop = request_of(
        start_Z, length_B, first_tile + tl.program_id(0), n_requests, BLOCK_QUERIES, BLOCK_REQUESTS
    )
    query_T = tl.arange(0, BLOCK_QUERIES)
    token_T = token + query_T
    wanted_T = is_wanted(token_T, n_left - query_T, stop + query_T, first, end, more_than, at_most)
    stop_T = tl.where(wanted_T, stop + query_T, 0)
    # R: pairs of a query and one of the heads that share an index key head
    pair_R = tl.arange(0, BLOCK_QUERIES * BLOCK_HEADS)
    query_R = pair_R // BLOCK_HEADS
    token_R = token + query_R
    present_R = is_wanted(token_R, n_left - query_R, stop + query_R, first, end, more_than, at_most)
    present_R &= pair_R % BLOCK_HEADS < SHARED
    head_R = token_R.to(tl.int64) * (KEY_HEADS * SHARED) + pair_R % BLOCK_HEADS
    row_T = scores_TS + (token_T - first).to(tl.int64) * scores_stride
    n_seen = tl.max(stop_T, 0)
    for low in range(tl.program_id(1) * BLOCK_KEYS, n_seen, tl.num_programs(1) * BLOCK_KEYS):
        key_S = low + tl.arange(0, BLOCK_KEYS)
        row_S = rows_from(block_BN + request * block_stride, low, n_seen, rows_per_block, PAGE, BLOCK_KEYS)
        scores_QS = tl.zeros([BLOCK_QUERIES, BLOCK_KEYS], tl.float32)
        for key_head in range(KEY_HEADS):
            weighted_RS = _weighted(
                *(q_TJE, w_TJ, b_TJ, head_R + key_head * SHARED, present_R),
                *(words_RW + key_head * (WIDTH // 2 + 1), row_S * row_stride, key_S < n_seen, scale),
                *(WIDTH, WEIGHTED, BLOCK_WORDS, DTYPE),
            )
            scores_QS += tl.sum(tl.reshape(weighted_RS, [BLOCK_QUERIES, BLOCK_HEADS, BLOCK_KEYS]), 1)
        scores_QS = tl.where(scores_QS == scores_QS, scores_QS, for_nan)
        tl.store(row_T[:, None] + key_S[None, :], scores_QS, mask=key_S[None, :] < stop_T[:, None])


@triton.jit(do_not_specialize=_LENGTHS)
def _paged_fine_kernel(
    q_TJE,
    w_TJ,
    b_TJ,
    words_RW,
    block_BN,
    start_Z,
    length_B,
    candidates_TC,
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
    at_most,
    n_candidates,
    scale,
    PAGE: tl.constexpr,
    BLOCK_REQUESTS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    SHARED: tl.constexpr,
    WIDTH: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    request, token, n_left, stop = request_of(
        start_Z, length_B, first_tile + tl.program_id(0), n_requests, 1, BLOCK_REQUESTS
    )
    wanted = is_wanted(token, n_left, stop, first, end, more_than, at_most)
    n_scored = tl.where(wanted, n_candidates, 0)
    shared_H = tl.arange(0, BLOCK_HEADS)
    present_H = shared_H < tl.where(wanted, SHARED, 0)
    head_H = token.to(tl.int64) * (KEY_HEADS * SHARED) + shared_H
    row = (token - first).to(tl.int64)
    for low in range(tl.program_id(1) * BLOCK_KEYS, n_scored, tl.num_programs(1) * BLOCK_KEYS):
        entry_C = low + tl.arange(0, BLOCK_KEYS)
        present_C = entry_C < n_scored
        key_C = tl.load(candidates_TC + row * n_candidates + entry_C, mask=present_C, other=0)
        row_C = rows_of(block_BN + request * block_stride, key_C, present_C, rows_per_block, PAGE)
        scores_C = tl.zeros([BLOCK_KEYS], tl.float32)
        for key_head in range(KEY_HEADS):
            weighted_HC = _weighted(
                *(q_TJE, w_TJ, b_TJ, head_H + key_head * SHARED, present_H),
                *(words_RW + key_head * (WIDTH // 2 + 1), row_C * row_stride, present_C, scale),
                *(WIDTH, WEIGHTED, BLOCK_WORDS, DTYPE),
            )
            scores_C += tl.sum(weighted_HC, 0)
        tl.store(scores_TS + row * scores_stride + entry_C, scores_C, mask=present_C)


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
    WEIGHTED: tl.constexpr,
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
    if WEIGHTED:
        relu_RS *= tl.load(w_TJ + head_R, mask=present_R, other=0.0).to(tl.float32)[:, None]
    return tl.where(present_R[:, None], relu_RS, 0.0)


@triton.jit
def _finite_or_nan(q, DTYPE: tl.constexpr):
    """A query that is not finite scores NaN."""
    q = q.to(tl.float32)
    return tl.where(tl.abs(q) == float("inf"), float("nan"), q).to(DTYPE)
