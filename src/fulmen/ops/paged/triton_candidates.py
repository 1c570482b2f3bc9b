"""Candidates: the best keys of long rows of scores, more than a program holds, by the rule of `select_topk`.

The parts of a row count the digits of their scores' ranks, the highest digit first: from the counts of all
parts each finds the threshold's digit, and counts the next one of the keys that have it. With four digits the
threshold is known, and what every part has above it and at it; so each writes its keys where they belong. As
`triton_select.py` hands on the keys themselves, it is better where few of a tile are left, and this where
many are.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fulmen.ops.paged.triton_blocks import Queries, is_wanted, request_of, requests_held
from fulmen.ops.paged.triton_select import candidate_bytes, launch_paged_select
from fulmen.ops.topk.triton import DIGIT_BITS, DIGIT_VALUES, DIGITS, ranks_of, threshold_digit
from fulmen.ops.triton_kit import compile_options, kernel_sizes, launch, power_of_2

# In rounds, if each leaves no more than one of so many keys of a tile.
FEW_OF_TILE = 4


def choose_candidates(scores_TS: Tensor, queries: Queries, candidates_TC: Tensor) -> None:
    """Write the C best keys of the queries, ascending, and nothing for others.

    Args:
        scores_TS: float32, of the tokens `queries.tokens` alone.
        queries: each sees more than C keys.
        candidates_TC: int32, of the same tokens.
    """
    n_candidates = candidates_TC.shape[1]
    if _few_are_left(queries.most_keys, n_candidates):
        launch_paged_select(scores_TS, queries, n_candidates, candidates_TC)
    else:
        launch_paged_candidates(scores_TS, queries, candidates_TC)


def choice_bytes(most_keys: int, n_candidates: int) -> int:
    """Of a query: what `choose_candidates` holds beside its scores and results."""
    if _few_are_left(most_keys, n_candidates):
        return candidate_bytes(most_keys, n_candidates)
    n_parts = triton.cdiv(most_keys, kernel_sizes("paged_candidates")["columns"])
    return n_parts * DIGITS.value * DIGIT_VALUES.value * torch.int16.itemsize


def _few_are_left(most_keys: int, n_candidates: int) -> bool:
    columns = kernel_sizes("paged_select")["columns"]
    return most_keys <= columns or n_candidates * FEW_OF_TILE <= columns


def launch_paged_candidates(scores_TS: Tensor, queries: Queries, candidates_TC: Tensor) -> None:
    """As `choose_candidates`, for any C."""
    sizes = kernel_sizes("paged_candidates")
    n_parts = triton.cdiv(queries.most_keys, sizes["columns"])
    shape = (queries.n_tokens, DIGITS.value, n_parts, DIGIT_VALUES.value)
    # A part has fewer keys than int16 counts.
    counts_TNPV = torch.empty(shape, dtype=torch.int16, device=scores_TS.device)
    grid = (queries.n_tiles(1), n_parts)
    options = {
        "BLOCK": sizes["columns"],
        "BLOCK_PARTS": power_of_2(n_parts),
        "BLOCK_REQUESTS": requests_held(queries.requests.count),
        **compile_options(sizes),
    }
    numbers = (*queries.numbers(1), candidates_TC.shape[1], n_parts)
    scores = (scores_TS, counts_TNPV, *queries.tables)
    for digit in range(DIGITS.value):
        launch(_paged_count_kernel, grid, *scores, scores_TS.stride(0), *numbers, DIGIT=digit, **options)
    strides = (scores_TS.stride(0), candidates_TC.stride(0))
    launch(_paged_candidates_kernel, grid, *scores, candidates_TC, *strides, *numbers, **options)


_LENGTHS = ["n_requests", "first_tile", "first", "end", "more_than", "at_most", "n_candidates", "n_parts"]


@triton.jit(do_not_specialize=_LENGTHS)
def _paged_count_kernel(
    scores_TS,
    counts_TNPV,
    start_Z,
    length_B,
    scores_stride,
    n_requests,
    first_tile,
    first,
    end,
    more_than,
    at_most,
    n_candidates,
    n_parts,
    DIGIT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_REQUESTS: tl.constexpr,
):
    _, token, n_left, stop = request_of(
        start_Z, length_B, first_tile + tl.program_id(0), n_requests, 1, BLOCK_REQUESTS
    )
    part = tl.program_id(1)
    if is_wanted(token, n_left, stop, first, end, more_than, at_most) & (part * BLOCK < stop):
        row = (token - first).to(tl.int64)
        counts_NPV = counts_TNPV + row * (DIGITS * DIGIT_VALUES * n_parts)
        prefix, _n_wanted, _above_P, _equal_P = _threshold_of_parts(
            counts_NPV, n_parts, stop, n_candidates, DIGIT, BLOCK, BLOCK_PARTS
        )
        key_C = part * BLOCK + tl.arange(0, BLOCK)
        rank_C = ranks_of(tl.load(scores_TS + row * scores_stride + key_C, mask=key_C < stop, other=0.0))
        counted_C = key_C < stop
        if DIGIT > 0:
            counted_C &= (rank_C >> (DIGIT_BITS * (DIGITS - DIGIT))) == prefix
        digit_C = (rank_C >> (DIGIT_BITS * (DIGITS - 1 - DIGIT))) & (DIGIT_VALUES - 1)
        digit_C = tl.where(counted_C, digit_C.to(tl.int32), 0)
        # All others were counted as 0.
        n_others = BLOCK - tl.sum(counted_C.to(tl.int32), 0)
        value_V = tl.arange(0, DIGIT_VALUES)
        count_V = tl.histogram(digit_C, DIGIT_VALUES) - tl.where(value_V == 0, n_others, 0)
        place_V = (DIGIT * n_parts + part) * DIGIT_VALUES + value_V
        tl.store(counts_NPV + place_V, count_V.to(tl.int16))


@triton.jit(do_not_specialize=_LENGTHS)
def _paged_candidates_kernel(
    scores_TS,
    counts_TNPV,
    start_Z,
    length_B,
    candidates_TC,
    scores_stride,
    candidates_stride,
    n_requests,
    first_tile,
    first,
    end,
    more_than,
    at_most,
    n_candidates,
    n_parts,
    BLOCK: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_REQUESTS: tl.constexpr,
):
    _, token, n_left, stop = request_of(
        start_Z, length_B, first_tile + tl.program_id(0), n_requests, 1, BLOCK_REQUESTS
    )
    part = tl.program_id(1)
    if is_wanted(token, n_left, stop, first, end, more_than, at_most) & (part * BLOCK < stop):
        row = (token - first).to(tl.int64)
        counts_NPV = counts_TNPV + row * (DIGITS * DIGIT_VALUES * n_parts)
        threshold, n_equal, above_P, equal_P = _threshold_of_parts(
            counts_NPV, n_parts, stop, n_candidates, DIGITS, BLOCK, BLOCK_PARTS
        )
        # Of equal keys the most recent are taken: those of later parts first.
        part_P = tl.arange(0, BLOCK_PARTS)
        equal_later_P = tl.sum(equal_P, 0) - tl.cumsum(equal_P, 0)
        taken_P = above_P + tl.minimum(tl.maximum(n_equal - equal_later_P, 0), equal_P)
        first_column = tl.sum(tl.where(part_P < part, taken_P, 0), 0)
        n_equal_later = tl.sum(tl.where(part_P > part, equal_P, 0), 0)

        key_C = part * BLOCK + tl.arange(0, BLOCK)
        rank_C = ranks_of(tl.load(scores_TS + row * scores_stride + key_C, mask=key_C < stop, other=0.0))
        rank_C = tl.where(key_C < stop, rank_C, 0).to(tl.uint32)
        equal_C = (rank_C == threshold).to(tl.int32)
        equal_later_C = n_equal_later + tl.sum(equal_C, 0) - tl.cumsum(equal_C, 0)
        taken_C = (rank_C > threshold) | ((equal_C == 1) & (equal_later_C < n_equal))
        column_C = first_column + tl.cumsum(taken_C.to(tl.int32), 0) - 1
        tl.store(candidates_TC + row * candidates_stride + column_C, key_C, mask=taken_C)


@triton.jit
def _threshold_of_parts(
    counts_NPV,
    n_parts,
    stop,
    n_wanted,
    N_DIGITS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    """By counts of the first N_DIGITS digits: the threshold's, and how many keys that have them are taken; of
    each part how many keys have higher ones, and how many have these.
    """
    part_P, value_V = tl.arange(0, BLOCK_PARTS), tl.arange(0, DIGIT_VALUES)
    there_P = (part_P < n_parts) & (part_P * BLOCK < stop)
    prefix = stop.to(tl.uint32) * 0
    above_P = tl.zeros([BLOCK_PARTS], tl.int32)
    equal_P = tl.zeros([BLOCK_PARTS], tl.int32)
    for digit in tl.static_range(N_DIGITS):
        place_PV = (digit * n_parts + part_P)[:, None] * DIGIT_VALUES + value_V[None, :]
        count_PV = tl.load(counts_NPV + place_PV, mask=there_P[:, None], other=0).to(tl.int32)
        chosen, n_above = threshold_digit(tl.sum(count_PV, 0), n_wanted)
        above_P += tl.sum(tl.where(value_V[None, :] > chosen, count_PV, 0), 1)
        equal_P = tl.sum(tl.where(value_V[None, :] == chosen, count_PV, 0), 1)
        prefix = (prefix << DIGIT_BITS) | chosen.to(tl.uint32)
        n_wanted -= n_above
    return prefix, n_wanted, above_P, equal_P
