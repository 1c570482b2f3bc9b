"""Selection: exact, one rule for ties and NaN, the same for every batch shape."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fulmen.ops.dispatch import pin_backend
from fulmen.ops.scores import index_scores
from fulmen.ops.topk import index_topk, select_topk
from tests.ops.ops_cases import causal, normal, ragged

pytestmark = pytest.mark.usefixtures("backend")

SCORES = st.one_of(
    st.floats(width=32),
    st.sampled_from([0.0, -0.0, 1.0, -1.0, math.nan, math.inf, -math.inf, 1e-45, -1e-45]),
)
ROWS = st.lists(SCORES, min_size=1, max_size=12)


def select_by_backends(scores, start, stop, topk):
    with pin_backend("reference"):
        expected = select_topk(scores, start, stop, topk)
    return select_topk(scores, start, stop, topk), expected


@settings(max_examples=200)
@given(
    st.lists(SCORES, min_size=1, max_size=12), st.integers(-2, 13), st.integers(-2, 14), st.integers(1, 14)
)
def test_one_row_keeps_the_rule(row, start, stop, topk):
    scores = torch.tensor([[row]])
    row = scores[0, 0].tolist()  # as float32 has them: two numbers of Python's may become one
    chosen, expected = select_by_backends(scores, torch.tensor([[start]]), torch.tensor([[stop]]), topk)
    assert torch.equal(chosen, expected)
    assert chosen.dtype == torch.int32
    assert chosen.shape == (1, 1, min(topk, len(row)))
    keys = [s for s in chosen[0, 0].tolist() if s >= 0]
    visible = range(max(start, 0), min(stop, len(row)))
    assert chosen[0, 0].tolist() == sorted(keys) + [-1] * (chosen.shape[-1] - len(keys))
    assert len(keys) == min(topk, len(visible))
    for kept in keys:
        for left in set(visible) - set(keys):
            assert beats(row[kept], kept, row[left], left)


def beats(score, position, other_score, other_position):
    if math.isnan(score) or math.isnan(other_score):
        if math.isnan(score) and math.isnan(other_score):
            return position > other_position
        return math.isnan(other_score)
    return score > other_score or (score == other_score and position > other_position)


@pytest.mark.parametrize("topk", [1, 7, 64, 300, 1000])
@pytest.mark.parametrize("kind", ["normal", "integers", "plateau of zeros", "constant", "nan and inf"])
def test_rows_with_heavy_ties_match_the_reference(kind, topk):
    numbers = normal(2, 30, 300)
    scores = {
        "normal": numbers,
        "integers": numbers.round(),
        "plateau of zeros": numbers.relu() * -1,
        "constant": numbers * 0 + 3,
        "nan and inf": numbers.round().div(0 * numbers.round()),
    }[kind]
    assert torch.equal(*select_by_backends(scores, *ragged(2, 30, 300), topk))
    assert torch.equal(*select_by_backends(scores, *causal(2, 30, 300), topk))


def test_the_more_recent_key_wins_a_tie():
    start, stop = causal(1, 3, 6)
    chosen = select_topk(torch.zeros(1, 3, 6), start, stop, 2)
    assert chosen.tolist() == [[[2, 3], [3, 4], [4, 5]]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes_are_compared_as_float32(dtype):
    scores = normal(1, 20, 90, dtype=dtype)
    interval = causal(1, 20, 90)
    assert torch.equal(select_topk(scores, *interval, 9), select_topk(scores.float(), *interval, 9))


def test_a_row_selects_the_same_alone_in_any_view_and_in_many_blocks():
    S = 3000  # more rows than one block takes
    scores = normal(1, 400, S).round(decimals=1)
    start, stop = causal(1, 400, S)
    together = select_topk(scores, start, stop, 50)
    strided = select_topk(scores.transpose(1, 2).contiguous().transpose(1, 2), start, stop, 50)
    assert torch.equal(strided, together)
    for t in (0, 17, 348, 349, 399):
        alone = select_topk(scores[:, t : t + 1], start[:, t : t + 1], stop[:, t : t + 1], 50)
        assert torch.equal(alone, together[:, t : t + 1])


def test_a_hidden_score_never_matters():
    scores = normal(1, 10, 60)
    start, stop = ragged(1, 10, 60)
    keys = torch.arange(60)
    hidden = (keys < start[..., None]) | (keys >= stop[..., None])
    for poison in (torch.nan, torch.inf, -torch.inf):
        poisoned = scores.masked_fill(hidden, poison)
        assert torch.equal(select_topk(poisoned, start, stop, 9), select_topk(scores, start, stop, 9))


def index_inputs(B, T, S, J=6, index_keys=2, E=16, seed=0):
    shapes = [(B, T, J, E), (B, S, index_keys, E), (B, T, J), (B, T, J)]
    return [normal(*shape, seed=seed + i) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("topk", [1, 9, 100, 1000])
@pytest.mark.parametrize("shifted", [True, False])
def test_index_topk_selects_from_the_index_scores(topk, shifted):
    q, k, w, b = index_inputs(2, 50, 150)
    b = b - 2 if shifted else None  # a low shift shuts most ReLUs: plateaus of exact zeros
    for interval in (causal(2, 50, 150), ragged(2, 50, 150)):
        chosen = index_topk(q, k, w, b, *interval, topk)
        assert torch.equal(chosen, select_topk(index_scores(q, k, w, b, *interval), *interval, topk))


def test_index_topk_matches_the_reference_where_scores_are_exact():
    q, k, w, b = (x.mul(2).round() for x in index_inputs(2, 50, 150, E=4))
    interval = ragged(2, 50, 150)
    with pin_backend("reference"):
        expected = index_topk(q, k, w, b, *interval, 20)
    assert torch.equal(index_topk(q, k, w, b, *interval, 20), expected)


@pytest.mark.parametrize("seed", range(30))
def test_a_query_selects_the_same_alone_in_a_batch_and_among_others(seed):
    B, T, S = 2, 24, 400
    heads = [(3, 3, 16), (8, 1, 20), (4, 2, 32), (9, 3, 8)][seed % 4]
    q, k, w, b = index_inputs(B, T, S, *heads, seed=seed)
    start, stop = causal(B, T, S)
    together = index_topk(q, k, w, b, start, stop, 32)
    for t in (0, 1, T // 2, T - 1):
        row = slice(t, t + 1)
        per_query = (x[1:, row] for x in (w, b, start, stop))
        alone = index_topk(q[1:, row], k[1:], *per_query, 32)
        assert torch.equal(alone, together[1:, row])


def test_nan_in_a_hidden_key_changes_nothing():
    q, k, w, b = index_inputs(1, 20, 100)
    start, stop = causal(1, 20, 90)
    poisoned = k.clone()
    poisoned[:, 90:] = torch.nan
    assert torch.equal(index_topk(q, poisoned, w, b, start, stop, 9), index_topk(q, k, w, b, start, stop, 9))


def test_nothing_to_select_from():
    nothing = torch.zeros(1, 2, dtype=torch.int64)
    assert select_topk(torch.zeros(1, 2, 0), nothing, nothing, 5).shape == (1, 2, 0)
    assert torch.equal(
        select_topk(torch.zeros(1, 2, 3), nothing + 1, nothing + 1, 5),
        torch.full((1, 2, 3), -1, dtype=torch.int32),
    )
