"""Selection by Triton kernels: the threshold digit by digit from histograms, then one pass that writes.

A score becomes 32 bits that are ordered as it is. Four passes over a row fix 8 of the threshold's bits each,
by counting (a radix select); a fifth, from the last key to the first, writes the keys above the threshold and
the most recent of those that equal it. Counts are integers: the order in which threads add does not matter.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fulmen.ops.common.index_keys import unpacked_index_inputs
from fulmen.ops.scores.triton import launch_index_scores
from fulmen.ops.triton_kit import compile_options, kernel_sizes, launch, power_of_2

# Scores that `index_topk` holds at a time: 256 MB.
HELD_SCORES = 2**26
DIGIT_BITS = tl.constexpr(8)
DIGIT_VALUES = tl.constexpr(256)
DIGITS = tl.constexpr(4)


def select_topk_triton(scores_BTS: Tensor, start_BT: Tensor, stop_BT: Tensor, topk: int) -> Tensor:
    """See `fulmen.ops.topk.select_topk`."""
    return launch_select(scores_BTS.float().contiguous(), start_BT, stop_BT, min(topk, scores_BTS.shape[-1]))


def index_topk_triton(
    q_BTJE: Tensor,
    k_BSIE: Tensor,
    w_BTJ: Tensor,
    b_BTJ: Tensor | None,
    start_BT: Tensor,
    stop_BT: Tensor,
    topk: int,
) -> Tensor:
    """See `fulmen.ops.topk.index_topk`. Queries that see no more than `topk` keys are not scored."""
    q_BTJE, k_BSIE = unpacked_index_inputs(q_BTJE, k_BSIE)
    batch, queries, n_keys = *q_BTJE.shape[:2], k_BSIE.shape[1]
    n_columns = min(topk, n_keys)
    topk_BTK = torch.empty(batch, queries, n_columns, dtype=torch.int32, device=q_BTJE.device)
    n_rows = max(HELD_SCORES // max(n_keys, 1), 1)
    n_queries = min(n_rows, max(queries, 1))
    n_batch = max(n_rows // n_queries, 1)
    for b in range(0, batch, n_batch):
        for t in range(0, queries, n_queries):
            some = (slice(b, b + n_batch), slice(t, t + n_queries))
            own = (q_BTJE[some], k_BSIE[some[0]], w_BTJ[some], None if b_BTJ is None else b_BTJ[some])
            intervals = (start_BT[some], stop_BT[some])
            scores_BTS = torch.empty(*intervals[0].shape, n_keys, device=q_BTJE.device)
            launch_index_scores(*own, *intervals, scores_BTS, enough=n_columns)
            topk_BTK[some] = launch_select(scores_BTS, *intervals, n_columns)
    return topk_BTK


def launch_select(scores_BTS: Tensor, start_BT: Tensor, stop_BT: Tensor, n_columns: int) -> Tensor:
    """topk_BTK of contiguous float32 scores; K is `n_columns`, at most S."""
    batch, queries, n_keys = scores_BTS.shape
    topk_BTK = torch.empty(batch, queries, n_columns, dtype=torch.int32, device=scores_BTS.device)
    if not topk_BTK.numel():
        return topk_BTK
    sizes = kernel_sizes("select")
    interval = (x.clamp(0, n_keys).int().contiguous() for x in (start_BT, stop_BT))
    launch(
        _select_kernel,
        (batch * queries,),
        *(scores_BTS, *interval, topk_BTK, n_keys, n_columns),
        BLOCK=min(sizes["columns"], power_of_2(n_keys)),
        **compile_options(sizes),
    )
    return topk_BTK


@triton.jit
def _select_kernel(scores_RS, start_R, stop_R, topk_RK, n_keys, n_columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    start, stop = tl.load(start_R + row), tl.load(stop_R + row)
    scores_S, topk_K = scores_RS + row * n_keys, topk_RK + row * n_columns
    if stop - start > n_columns:
        threshold, n_equal = _find_threshold(scores_S, start, stop, n_columns, BLOCK)
        _write_best(scores_S, start, stop, threshold, n_equal, topk_K, n_columns, BLOCK)
    else:
        for low in range(0, n_columns, BLOCK):
            column_C = low + tl.arange(0, BLOCK)
            key_C = tl.where(start + column_C < stop, start + column_C, -1)
            tl.store(topk_K + column_C, key_C, mask=column_C < n_columns)


@triton.jit
def _find_threshold(scores_S, start, stop, n_wanted, BLOCK: tl.constexpr):
    """The rank of the last key that is selected, and how many keys of just that rank are."""
    prefix = start.to(tl.uint32) * 0
    for digit in tl.static_range(DIGITS):
        count_D = _count_digits(
            scores_S, start, stop, prefix, DIGIT_BITS * (DIGITS - 1 - digit), digit > 0, BLOCK
        )
        chosen, n_above = threshold_digit(count_D, n_wanted)
        prefix = (prefix << DIGIT_BITS) | chosen.to(tl.uint32)
        n_wanted -= n_above
    return prefix, n_wanted


@triton.jit
def threshold_digit(count_D, n_wanted):
    """The threshold's digit, and how many keys have a higher one, from how many have each.

    It is the largest with enough keys at least there. Digit 0 always has: its own count, which is too high,
    is never looked at.
    """
    digit_D = tl.arange(0, DIGIT_VALUES)
    at_least_D = tl.sum(count_D, 0) - tl.cumsum(count_D, 0) + count_D
    enough_D = (at_least_D >= n_wanted) & (digit_D > 0)
    too_few_D = (at_least_D < n_wanted) & (digit_D > 0)
    return tl.sum(enough_D.to(tl.int32), 0), tl.max(tl.where(too_few_D, at_least_D, 0), 0)


@triton.jit
def _count_digits(
    scores_S, start, stop, prefix, SHIFT: tl.constexpr, HAS_PREFIX: tl.constexpr, BLOCK: tl.constexpr
):
    """How many keys have each digit, of those whose higher bits are `prefix`; all others count as digit 0."""
    count_D = tl.zeros([DIGIT_VALUES], tl.int32)
    for low in range(start // BLOCK * BLOCK, stop, BLOCK):
        rank_C = _load_ranks(scores_S, low + tl.arange(0, BLOCK), start, stop)
        digit_C = ((rank_C >> SHIFT) & (DIGIT_VALUES - 1)).to(tl.int32)
        if HAS_PREFIX:
            digit_C = tl.where((rank_C >> (SHIFT + DIGIT_BITS)) == prefix, digit_C, 0)
        count_D += tl.histogram(digit_C, DIGIT_VALUES)
    return count_D


@triton.jit
def _write_best(scores_S, start, stop, threshold, n_equal, topk_K, n_columns, BLOCK: tl.constexpr):
    """Write `n_columns` keys in ascending order, found from the last one backward."""
    first = start // BLOCK * BLOCK
    n_tiles = tl.cdiv(stop - first, BLOCK)
    n_equal_later = n_equal * 0
    n_taken_later = n_equal * 0
    for tile in range(n_tiles):
        key_C = first + (n_tiles - 1 - tile) * BLOCK + tl.arange(0, BLOCK)
        rank_C = _load_ranks(scores_S, key_C, start, stop)
        equal_C = (rank_C == threshold).to(tl.int32)
        all_equal = tl.sum(equal_C, 0)
        equal_later_C = n_equal_later + all_equal - tl.cumsum(equal_C, 0)
        taken_C = (rank_C > threshold) | ((equal_C == 1) & (equal_later_C < n_equal))
        one_C = taken_C.to(tl.int32)
        all_taken = tl.sum(one_C, 0)
        taken_later_C = n_taken_later + all_taken - tl.cumsum(one_C, 0)
        tl.store(topk_K + (n_columns - 1 - taken_later_C), key_C, mask=taken_C)
        n_equal_later += all_equal
        n_taken_later += all_taken


@triton.jit
def _load_ranks(scores_S, key_C, start, stop):
    """As `ranks_of`; 0 is hidden."""
    visible_C = (key_C >= start) & (key_C < stop)
    rank_C = ranks_of(tl.load(scores_S + key_C, mask=visible_C, other=0.0))
    return tl.where(visible_C, rank_C, 0).to(tl.uint32)


@triton.jit
def ranks_of(scores_C):
    """uint32 above 0, ordered as the scores: 1 is NaN, -0.0 is 0.0. By integers: denormals count."""
    bits_C = scores_C.to(tl.int32, bitcast=True)
    size_C = bits_C & 0x7FFFFFFF
    # The bits of a float are ordered as an integer once those below the sign are flipped in negative numbers.
    ordered_C = tl.where(size_C == 0, 0, bits_C ^ ((bits_C >> 31) & 0x7FFFFFFF))
    rank_C = ordered_C.to(tl.uint32, bitcast=True) ^ 0x80000000
    return tl.where(size_C > 0x7F800000, 1, rank_C).to(tl.uint32)
