"""The best keys of long rows of scores, split over programs; the rule is that of `select_topk`.

A program holds a tile of a row in registers, finds its k best by their ranks, digit by digit, and writes them
in the order of their positions. The best of all tiles are among the best of each (of equal ones, too: a tile
keeps its most recent), so the same kernel goes on with what several tiles left, until one tile holds all.
Counts are integers: the order in which threads add does not matter.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fulmen.ops.paged.requests import Requests
from fulmen.ops.paged.triton_blocks import request_of, requests_held, tiles_of
from fulmen.ops.topk.triton import DIGIT_BITS, DIGIT_VALUES, DIGITS, ranks_of, threshold_digit
from fulmen.ops.triton_kit import compile_options, kernel_sizes, launch, power_of_2

# A tile of candidates holds those of at least so many tiles before.
LEAST_GROUP = 2


def launch_paged_select(
    scores_TS: Tensor,
    requests: Requests,
    tokens: slice,
    more_than: int,
    topk: int,
    chosen_TK: Tensor,
) -> None:
    """Write the `topk` best keys of queries that see `more_than` so many keys, ascending; of others nothing.

    Args:
        scores_TS: float32, as `launch_paged_scores` leaves them, of the tokens `tokens` alone.
        more_than: at least `topk`.
        chosen_TK: int32, of all tokens.
    """
    sizes = kernel_sizes("paged_select")
    block = _block_of(topk)
    group, span = block // topk, block
    n_parts = triton.cdiv(requests.most_keys, span)
    first_tile, n_tiles = tiles_of(tokens.start, tokens.stop, requests.count, 1)
    ranks_TC = scores_TS  # of the first round; stands for what it does not have
    positions_TC = chosen_TK
    options = {
        "BLOCK": block,
        "BLOCK_REQUESTS": requests_held(requests.count),
        **compile_options(sizes),
    }
    is_first, count = True, tokens.stop - tokens.start
    while True:
        is_last = n_parts == 1
        ranks_out = ranks_TC if is_last else scores_TS.new_empty(count, n_parts * topk, dtype=torch.int32)
        positions_out = chosen_TK[tokens] if is_last else torch.empty_like(ranks_out)
        launch(
            *(_paged_select_kernel, (n_tiles, n_parts), ranks_TC, positions_TC, ranks_out, positions_out),
            *(requests.start_Z, requests.length_B, ranks_TC.stride(0), positions_out.stride(0)),
            *(requests.count, first_tile, tokens.start, tokens.stop, more_than, topk, group, span),
            IS_FIRST=is_first,
            IS_LAST=is_last,
            **options,
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


_LENGTHS = ["n_requests", "first_tile", "first", "end", "more_than", "topk", "group", "span"]


@triton.jit(do_not_specialize=_LENGTHS)
def _paged_select_kernel(
    ranks_TC,
    positions_TC,
    ranks_out_TC,
    positions_out_TC,
    start_Z,
    length_B,
    in_stride,
    out_stride,
    n_requests,
    first_tile,
    first,
    end,
    more_than,
    topk,
    group,
    span,
    IS_FIRST: tl.constexpr,
    IS_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_REQUESTS: tl.constexpr,
):
    _, token, n_left, stop = request_of(
        start_Z, length_B, first_tile + tl.program_id(0), n_requests, 1, BLOCK_REQUESTS
    )
    # Keys among which this program selects; those of several tiles before, unless it is the first round.
    low = tl.program_id(1) * span
    n_keys = tl.minimum(stop - low, span)
    if (n_left > 0) & (token >= first) & (token < end) & (stop > more_than) & (n_keys > 0):
        row = (token - first).to(tl.int64)
        entry_C = tl.arange(0, BLOCK)
        if IS_FIRST:
            n_entries = n_keys
            scores_C = tl.load(
                ranks_TC + row * in_stride + low + entry_C, mask=entry_C < n_entries, other=0.0
            )
            rank_C = ranks_of(scores_C)
            position_C = low + entry_C
        else:
            # Each tile before has left `topk` of its keys, or all that it had.
            tile_span = span // group
            n_entries = n_keys // tile_span * topk + tl.minimum(n_keys % tile_span, topk)
            place_C = row * in_stride + tl.program_id(1) * group * topk + entry_C
            rank_C = tl.load(ranks_TC + place_C, mask=entry_C < n_entries, other=0).to(
                tl.uint32, bitcast=True
            )
            position_C = tl.load(positions_TC + place_C, mask=entry_C < n_entries, other=0)
        rank_C = tl.where(entry_C < n_entries, rank_C, 0).to(tl.uint32)
        taken_C = entry_C < n_entries
        if n_entries > topk:
            threshold, n_equal = _threshold_of(rank_C, topk)
            equal_C = (rank_C == threshold).to(tl.int32)
            equal_later_C = tl.sum(equal_C, 0) - tl.cumsum(equal_C, 0)
            taken_C = (rank_C > threshold) | ((equal_C == 1) & (equal_later_C < n_equal))
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
