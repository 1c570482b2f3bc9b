"""The best keys of long rows of scores, split over programs; the rule is that of `select_topk`.

A program holds a tile of a row in registers, finds its k best by their ranks, digit by digit, and writes them
in the order of their positions. The best of all tiles are among the best of each (of equal ones, too: a tile
keeps its most recent), so the same kernel goes on with what several tiles left, until one tile holds all.
Counts are integers: the order in which threads add does not matter.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fulmen.ops.paged.triton_blocks import Queries, is_wanted, request_of, requests_held
from fulmen.ops.topk.triton import DIGIT_BITS, DIGIT_VALUES, DIGITS, ranks_of, threshold_digit
from fulmen.ops.triton_kit import compile_options, kernel_sizes, launch, power_of_2

# A tile of candidates holds those of at least so many tiles before.
LEAST_GROUP = 2


class Candidates(NamedTuple):
    """Of queries that see more than `more_than` keys the positions, ascending, whose scores are given."""

    positions_TC: Tensor
    more_than: int


def launch_paged_select(
    scores_TS: Tensor, queries: Queries, topk: int, chosen_TK: Tensor, candidates: Candidates | None = None
) -> None:
    """Write the `topk` best keys of the queries, ascending, and nothing for others.

    Args:
        scores_TS: float32, of the tokens `queries.tokens` alone: of the keys that a query sees, or of its
            candidates, if there are some.
        queries: each sees at least `topk` keys.
        chosen_TK: int32, of the same tokens.
    """
    sizes, block, requests = kernel_sizes("paged_select"), _block_of(topk), queries.requests
    group, span = block // topk, block
    most_scores = min(queries.most_keys, scores_TS.shape[1])
    n_parts = triton.cdiv(most_scores, span)
    # What is not there stands for it, and is not read.
    given_TC, coarse_from = (chosen_TK, queries.most_keys) if candidates is None else candidates
    ranks_TC, positions_TC = scores_TS, given_TC
    is_first = True
    while True:
        is_last = n_parts == 1
        size = (queries.n_tokens, n_parts * topk)
        ranks_out = ranks_TC if is_last else scores_TS.new_empty(size, dtype=torch.int32)
        positions_out = chosen_TK if is_last else torch.empty_like(ranks_out)
        launch(
            *(_paged_select_kernel, (queries.n_tiles(1), n_parts), ranks_TC, positions_TC, ranks_out),
            *(positions_out, *queries.tables, ranks_TC.stride(0), positions_TC.stride(0)),
            *(positions_out.stride(0), *queries.numbers(1), topk, group, span),
            *(given_TC.shape[1], coarse_from),
            IS_FIRST=is_first,
            IS_LAST=is_last,
            BLOCK=block,
            BLOCK_REQUESTS=requests_held(requests.count),
            **compile_options(sizes),
        )
        if is_last:
            return
        is_first, ranks_TC, positions_TC = False, ranks_out, positions_out
        n_parts, span = triton.cdiv(n_parts, group), span * group


def candidate_bytes(most_keys: int, topk: int) -> int:
    """Of a query: what rounds of the selection hand on, two of which are held at a time."""
    block = _block_of(topk)
    n_parts = triton.cdiv(most_keys, block)
    return 0 if n_parts == 1 else 8 * topk * (n_parts + triton.cdiv(n_parts, block // topk))


def _block_of(topk: int) -> int:
    return max(kernel_sizes("paged_select")["columns"], power_of_2(LEAST_GROUP * topk))


_LENGTHS = [
    *("n_requests", "first_tile", "first", "end", "more_than", "at_most", "topk", "group", "span"),
    *("n_candidates", "coarse_from"),
]


@triton.jit(do_not_specialize=_LENGTHS)
def _paged_select_kernel(
    ranks_TC,
    positions_TC,
    ranks_out_TC,
    positions_out_TC,
    start_Z,
    length_B,
    ranks_stride,
    positions_stride,
    out_stride,
    n_requests,
    first_tile,
    first,
    end,
    more_than,
    at_most,
    topk,
    group,
    span,
    n_candidates,
    coarse_from,
    IS_FIRST: tl.constexpr,
    IS_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_REQUESTS: tl.constexpr,
):
    _, token, n_left, stop = request_of(
        start_Z, length_B, first_tile + tl.program_id(0), n_requests, 1, BLOCK_REQUESTS
    )
    # Among which this program selects; those of several tiles before, unless it is the first round.
    low = tl.program_id(1) * span
    n_scores = tl.minimum(tl.where(stop > coarse_from, n_candidates, stop) - low, span)
    if is_wanted(token, n_left, stop, first, end, more_than, at_most) & (n_scores > 0):
        row = (token - first).to(tl.int64)
        entry_C = tl.arange(0, BLOCK)
        if IS_FIRST:
            n_entries = n_scores
            scores_C = ranks_TC + row * ranks_stride + low + entry_C
            rank_C = ranks_of(tl.load(scores_C, mask=entry_C < n_entries, other=0.0))
            position_C = low + entry_C
        else:
            # Each tile before has left `topk` of its keys, or all that it had.
            tile_span = span // group
            n_entries = n_scores // tile_span * topk + tl.minimum(n_scores % tile_span, topk)
            place_C = tl.program_id(1) * group * topk + entry_C
            ranks_C = ranks_TC + row * ranks_stride + place_C
            rank_C = tl.load(ranks_C, mask=entry_C < n_entries, other=0).to(tl.uint32, bitcast=True)
            positions_C = positions_TC + row * positions_stride + place_C
            position_C = tl.load(positions_C, mask=entry_C < n_entries, other=0)
        rank_C = tl.where(entry_C < n_entries, rank_C, 0).to(tl.uint32)
        taken_C = entry_C < n_entries
        if n_entries > topk:
            threshold, n_equal = _threshold_of(rank_C, topk)
            equal_C = (rank_C == threshold).to(tl.int32)
            equal_later_C = tl.sum(equal_C, 0) - tl.cumsum(equal_C, 0)
            taken_C = (rank_C > threshold) | ((equal_C == 1) & (equal_later_C < n_equal))
        if IS_FIRST:
            n_given = tl.where(stop > coarse_from, n_entries, 0)
            given_C = positions_TC + row * positions_stride + position_C
            given_C = tl.load(given_C, mask=taken_C & (entry_C < n_given), other=0)
            position_C = tl.where(stop > coarse_from, given_C, position_C)
        column_C = tl.cumsum(taken_C.to(tl.int32), 0) - 1 + tl.program_id(1) * topk
        tl.store(positions_out_TC + row * out_stride + column_C, position_C, mask=taken_C)
        if not IS_LAST:
            ranks = rank_C.to(tl.int32, bitcast=True)
            tl.store(ranks_out_TC + row * out_stride + column_C, ranks, mask=taken_C)


@triton.jit
def _threshold_of(rank_C, n_wanted):
    """The rank of the last entry that is selected, and how many of just that rank are. Rank 0 is no entry."""
    prefix = n_wanted.to(tl.uint32) * 0
    for number in tl.static_range(DIGITS):
        digit_C = ((rank_C >> (DIGIT_BITS * (DIGITS - 1 - number))) & (DIGIT_VALUES - 1)).to(tl.int32)
        if number > 0:
            digit_C = tl.where((rank_C >> (DIGIT_BITS * (DIGITS - number))) == prefix, digit_C, 0)
        chosen, n_above = threshold_digit(tl.histogram(digit_C, DIGIT_VALUES), n_wanted)
        prefix = (prefix << DIGIT_BITS) | chosen.to(tl.uint32)
        n_wanted -= n_above
    return prefix, n_wanted
