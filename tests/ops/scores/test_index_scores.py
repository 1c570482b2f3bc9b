"""Index scores against their specification, and how stable their bits are."""

from functools import cache

import pytest
import torch

from fulmen.ops.common.index_keys import pack_index_keys, unpack_index_keys
from fulmen.ops.scores import index_scores
from fulmen.ops.scores.reference import index_scores_reference
from fulmen.ops.topk import index_topk
from tests.ops.ops_cases import EACH_BACKEND_AND_DTYPE, assert_near, causal, normal, ragged

pytestmark = pytest.mark.usefixtures("backend")

# J, I, E: one per key group, several per group, V3.2's single key head, odd numbers
HEADS = {"one-each": (3, 3, 8), "grouped": (4, 2, 32), "single-key": (8, 1, 64), "odd": (9, 3, 20)}
# B, T, S; "long" takes several tiles of keys and blocks of queries
SIZES = {"odd": (2, 37, 83), "decode": (3, 1, 83), "long": (1, 100, 2500)}


def inputs(sizes, heads, dtype=torch.float32, seed=0):
    (B, T, S), (J, index_keys, E) = sizes, heads
    shapes = [(B, T, J, E), (B, S, index_keys, E), (B, T, J), (B, T, J)]
    return [normal(*shape, seed=seed + i, dtype=dtype) for i, shape in enumerate(shapes)]


@cache  # for all backends
def expected_of(sizes, heads, dtype, shifted):
    q, k, w, b = inputs(sizes, heads, dtype)
    return index_scores_reference(q, k, w, b if shifted else None, *ragged(*sizes)).scores_BTS


@pytest.mark.parametrize("shifted", [True, False])
@EACH_BACKEND_AND_DTYPE
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_matches_the_reference(sizes, heads, dtype, shifted):
    q, k, w, b = inputs(sizes, heads, dtype)
    b = b if shifted else None
    interval = ragged(*sizes)
    scores = index_scores(q, k, w, b, *interval)
    assert scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # Both compute in float32 from the same bfloat16 inputs.
    tight = torch.float32 if dtype == torch.bfloat16 else dtype
    assert_near(scores, expected_of(sizes, heads, dtype, shifted), tight)


def test_formula_by_hand():
    q = torch.tensor([[[[3.0, 0.0], [0.0, 4.0]]]])
    k = torch.tensor([[[[2.0, 1.0]], [[-2.0, 1.0]], [[5.0, 5.0]]]])
    w, b = torch.tensor([[[10.0, 100.0]]]), torch.tensor([[[0.5, -1.0]]])
    interval = torch.tensor([[0]]), torch.tensor([[2]])
    root = 2**0.5
    first = 10 * (6 / root + 0.5) + 100 * (4 / root - 1)
    second = 100 * (4 / root - 1)  # the first head's ReLU is shut
    scores = index_scores(q, k, w, b, *interval)
    torch.testing.assert_close(scores, torch.tensor([[[first, second, -torch.inf]]]))


def test_weights_and_shift_may_keep_float32_beside_bfloat16_queries():
    q, k, w, b = inputs(SIZES["odd"], HEADS["grouped"])
    interval = ragged(*SIZES["odd"])
    scores = index_scores(q.bfloat16(), k.bfloat16(), w, b, *interval)
    expected = index_scores_reference(q.bfloat16().float(), k.bfloat16().float(), w, b, *interval).scores_BTS
    assert_near(scores, expected, torch.float32)


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_a_sequence_has_the_same_bits_alone_and_in_a_batch(heads):
    sizes = (3, 20, 70)
    q, k, w, b = inputs(sizes, heads)
    interval = ragged(*sizes)
    together = index_scores(q, k, w, b, *interval)
    for row in range(3):
        alone = index_scores(*(x[row : row + 1] for x in (q, k, w, b, *interval)))
        assert torch.equal(together[row : row + 1], alone)


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_left_padding_does_not_change_the_scores(heads):
    q, k, w, b = inputs((1, 20, 20), heads)
    start, stop = causal(1, 20, 20)
    alone = index_scores(q, k, w, b, start, stop)
    front = 13
    padded = [torch.cat([torch.full_like(x[:, :front], torch.nan), x], 1) for x in (q, k, w, b)]
    shifted = [torch.cat([torch.zeros(1, front, dtype=torch.int64), x + front], 1) for x in (start, stop)]
    scores = index_scores(*padded, *shifted)
    assert_near(scores[:, front:, front:], alone, torch.float32)
    assert torch.equal(scores[:, :front], torch.full((1, front, 33), -torch.inf))
    assert torch.equal(scores[:, front:, :front], torch.full((1, 20, front), -torch.inf))


def test_views_give_the_same_scores():
    sizes = SIZES["odd"]
    q, k, w, b = inputs(sizes, HEADS["grouped"])
    interval = ragged(*sizes)
    views = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, w, b, *interval)]
    assert torch.equal(index_scores(*views), index_scores(q, k, w, b, *interval))


def test_under_autocast_the_arithmetic_stays_float32():
    q, k, w, b = inputs(SIZES["odd"], HEADS["grouped"])
    interval = ragged(*SIZES["odd"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = index_scores(q, k, w, b, *interval)
    assert torch.equal(scores, index_scores(q.bfloat16(), k.bfloat16(), w, b, *interval))


@cache  # for all backends
def expected_of_packed(sizes, heads, dtype):
    """By float64, from the numbers that packed keys stand for."""
    q, k, w, b = inputs(sizes, heads, dtype)
    exact = [x.double() for x in (q, unpack_index_keys(pack_index_keys(k)), w, b)]
    return index_scores_reference(*exact, *ragged(*sizes)).scores_BTS


@EACH_BACKEND_AND_DTYPE
@pytest.mark.parametrize("heads", [*HEADS.values(), (2, 2, 66), (6, 3, 130)], ids=str)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_packed_keys_score_as_the_numbers_they_stand_for(sizes, heads, dtype):
    q, k, w, b = inputs(sizes, heads, dtype)
    packed, interval = pack_index_keys(k), ragged(*sizes)
    scores = index_scores(q, packed, w, b, *interval)
    expected = expected_of_packed(sizes, heads, dtype).to(scores.dtype)
    tight = torch.float32 if dtype == torch.bfloat16 else dtype
    assert_near(scores, expected, tight)


def test_packed_keys_may_lie_anywhere():
    sizes = SIZES["odd"]
    q, k, w, b = inputs(sizes, HEADS["odd"])
    packed, interval = pack_index_keys(k), ragged(*sizes)
    expected = index_scores(q, packed, w, b, *interval)
    larger = torch.full((2, 100, 3, 40), 77, dtype=torch.int8)
    with_gaps = larger[:, 10:93, :, 5:27].copy_(packed)
    transposed = packed.permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1)
    for view in (with_gaps, packed.transpose(1, 2).contiguous().transpose(1, 2), transposed):
        assert torch.equal(index_scores(q, view, w, b, *interval), expected)


def test_a_packed_key_that_is_no_number_makes_nan_of_its_own_scores_alone():
    q, k, w, b = inputs((1, 20, 70), HEADS["grouped"])
    interval = causal(1, 20, 70)
    expected = index_scores(q, pack_index_keys(k), w, b, *interval)
    k[0, 33, 1, 2] = torch.nan
    scores = index_scores(q, pack_index_keys(k), w, b, *interval)
    assert scores[..., 33].isnan().all()
    scores[..., 33] = expected[..., 33]
    assert torch.equal(scores, expected)


@pytest.mark.parametrize("queries", [1, 20], ids=["decode", "chunk"])
@pytest.mark.parametrize("packed", [False, True], ids=["numbers", "packed"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_query_that_is_not_finite_scores_nan_and_of_no_other(bad, packed, queries):
    q, k, w, b = inputs((2, queries, 70), HEADS["grouped"])
    k, interval = pack_index_keys(k) if packed else k, causal(2, queries, 70)
    expected = index_scores(q, k, w, b, *interval)
    poisoned, row = q.clone(), queries // 3
    poisoned[1, row, 2, 5] = bad
    scores = index_scores(poisoned, k, w, b, *interval)
    stop = int(interval[1][1, row])
    assert scores[1, row, :stop].isnan().all()
    # NaN ranks below every number, and equals go to the more recent.
    chosen = index_topk(poisoned, k, w, b, *interval, 9)
    assert chosen[1, row].tolist() == list(range(stop - 9, stop))
    scores[1, row] = expected[1, row]
    assert torch.equal(scores, expected)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_queries_of_any_size_score_packed_keys(size):
    q, k, w, _ = inputs((1, 20, 70), HEADS["grouped"])
    packed, interval = pack_index_keys(k), causal(1, 20, 70)
    expected = index_scores(q, packed, w, None, *interval)
    assert_near(index_scores(q * size, packed, w, None, *interval) / size, expected, torch.float32)
    visible = index_scores(q * 0, packed, w, None, *interval)[expected.isfinite()]
    assert torch.equal(visible, torch.zeros_like(visible))


def test_heads_of_any_size_score_packed_keys_together():
    """Weights make up for the size of a query's heads, shifts follow it: scores stay as they were."""
    q, k, w, b = inputs((2, 20, 70), HEADS["grouped"])
    packed, interval = pack_index_keys(k), causal(2, 20, 70)
    size_J = torch.tensor([2.0**100, 1, 2.0**-100, 2.0**62])
    sized = (q * size_J[:, None], packed, w / size_J, b * size_J)
    assert_near(index_scores(*sized, *interval), index_scores(q, packed, w, b, *interval), torch.float32)


def test_under_autocast_packed_keys_stay_as_they_are():
    q, k, w, b = inputs(SIZES["odd"], HEADS["grouped"])
    interval, packed = ragged(*SIZES["odd"]), pack_index_keys(k)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = index_scores(q, packed, w, b, *interval)
    assert torch.equal(scores, index_scores(q.bfloat16(), packed, w, b, *interval))
