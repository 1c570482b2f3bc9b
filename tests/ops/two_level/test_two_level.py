"""Selection in two levels: by every backend the reference's, whatever else is computed at the same time."""

import pytest
import torch

from fulmen.errors import ConfigError
from fulmen.ops.common.index_keys import pack_index_keys
from fulmen.ops.dispatch import pin_backend
from fulmen.ops.scores import index_scores
from fulmen.ops.topk import index_topk
from fulmen.ops.two_level import two_level_topk
from tests.ops.ops_cases import causal, normal, ragged

pytestmark = pytest.mark.usefixtures("backend")

# J, I, E, M, N
SHAPES = [(9, 3, 48, 4, 24), (4, 1, 10, 1, 6), (6, 2, 32, 17, 70)]


def case(shape, batch, queries, keys, dtype=torch.float32, packed=True, intervals=causal):
    heads, key_heads, width, coarse_heads, coarse = shape
    k = normal(batch, keys, key_heads, width, seed=1, dtype=dtype)
    coarse_k = normal(batch, keys, coarse, seed=2, dtype=dtype)
    coarse_k[:, keys // 2] = coarse_k[:, 0]  # a tie
    start, stop = intervals(batch, queries, keys)
    return {
        "coarse_q_BTMN": normal(batch, queries, coarse_heads, coarse, seed=3, dtype=dtype),
        "coarse_k_BSN": pack_index_keys(coarse_k) if packed else coarse_k,
        "coarse_b_BTM": normal(batch, queries, coarse_heads, seed=7, dtype=dtype) + 3,
        "q_BTJE": normal(batch, queries, heads, width, seed=4, dtype=dtype),
        "k_BSIE": pack_index_keys(k) if packed else k,
        "w_BTJ": normal(batch, queries, heads, seed=5, dtype=dtype),
        "b_BTJ": normal(batch, queries, heads, seed=6, dtype=dtype),
        "start_BT": start,
        "stop_BT": stop,
    }


def by_reference(inputs, topk, n_candidates):
    with pin_backend("reference"):
        return two_level_topk(**inputs, topk=topk, n_candidates=n_candidates)


@pytest.mark.parametrize(
    ("packed", "dtype", "intervals"),
    [
        (True, torch.bfloat16, ragged),
        (True, torch.float32, ragged),
        (False, torch.float32, causal),
        (False, torch.bfloat16, ragged),
    ],
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("queries", [1, 3, 40])
def test_every_backend_selects_as_the_reference(shape, queries, dtype, packed, intervals):
    inputs = case(shape, 2, queries, 210, dtype, packed, intervals)
    for topk, n_candidates in ((7, 7), (7, 30), (20, 160)):
        chosen = two_level_topk(**inputs, topk=topk, n_candidates=n_candidates)
        assert torch.equal(chosen, by_reference(inputs, topk, n_candidates))
        assert chosen.dtype == torch.int32


@pytest.mark.parametrize("queries", [1, 90])
def test_queries_that_see_few_keys_are_left_to_the_indexer(queries):
    inputs = case(SHAPES[0], 2, queries, 210, torch.bfloat16, intervals=ragged)
    limits = {"topk": 7, "n_candidates": 20, "all_up_to": 100}
    chosen = two_level_topk(**inputs, **limits)
    with pin_backend("reference"):
        assert torch.equal(chosen, two_level_topk(**inputs, **limits))
    index = {name: x for name, x in inputs.items() if not name.startswith("coarse")}
    visible = inputs["stop_BT"].clamp(0, 210) - inputs["start_BT"].clamp(min=0)
    assert torch.equal(chosen[visible <= 100], index_topk(**index, topk=7)[visible <= 100])


def test_float64_selects_as_the_reference():
    inputs = case(SHAPES[0], 1, 5, 90, torch.float64, packed=False)
    with pin_backend("torch"):
        chosen = two_level_topk(**inputs, topk=5, n_candidates=20)
    assert torch.equal(chosen, by_reference(inputs, 5, 20))


def test_only_candidates_are_selected_and_the_best_of_them():
    inputs = case(SHAPES[0], 1, 1, 300)
    q, b = inputs["coarse_q_BTMN"], inputs["coarse_b_BTM"]
    intervals = (inputs["start_BT"], inputs["stop_BT"])
    coarse = index_scores(q, inputs["coarse_k_BSN"][:, :, None], torch.ones_like(b), b, *intervals)[0, 0]
    candidates = set(coarse.topk(30).indices.tolist())
    chosen = two_level_topk(**inputs, topk=8, n_candidates=30)[0, 0].tolist()
    index = {name: x for name, x in inputs.items() if not name.startswith("coarse")}
    ranked = index_topk(**index, topk=300)[0, 0].tolist()
    assert set(chosen) <= candidates
    alone = two_level_topk(**inputs, topk=30, n_candidates=30)[0, 0].tolist()
    assert set(alone) == candidates
    assert len(ranked) == 300
    assert chosen == sorted(chosen)


def test_with_all_keys_as_candidates_it_is_the_indexer_alone():
    inputs = case(SHAPES[0], 2, 30, 150, torch.bfloat16)
    index = {name: x for name, x in inputs.items() if not name.startswith("coarse")}
    expected = index_topk(**index, topk=9)
    poisoned = {**inputs, "coarse_q_BTMN": torch.full_like(inputs["coarse_q_BTMN"], torch.nan)}
    assert torch.equal(two_level_topk(**poisoned, topk=9, n_candidates=150), expected)


def test_a_query_selects_the_same_alone_in_a_batch_and_in_a_chunk():
    inputs = case(SHAPES[0], 3, 50, 260, torch.bfloat16)
    together = two_level_topk(**inputs, topk=8, n_candidates=40)
    whole = ("coarse_k_BSN", "k_BSIE")
    for row, query in ((0, 0), (1, 17), (2, 49)):
        alone = {
            name: x[row, None] if name in whole else x[row, None, query, None] for name, x in inputs.items()
        }
        assert torch.equal(two_level_topk(**alone, topk=8, n_candidates=40)[0, 0], together[row, query])
    chunk = {name: x if name in whole else x[:, 20:33] for name, x in inputs.items()}
    assert torch.equal(two_level_topk(**chunk, topk=8, n_candidates=40), together[:, 20:33])


def test_threads_change_nothing():
    inputs = case(SHAPES[0], 1, 70, 900, torch.bfloat16)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(two_level_topk(**inputs, topk=20, n_candidates=100))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_the_more_recent_of_equal_keys_are_candidates():
    inputs = case(SHAPES[0], 1, 2, 60)
    inputs["coarse_k_BSN"] = inputs["coarse_k_BSN"][:, :1].expand(-1, 60, -1)
    chosen = two_level_topk(**inputs, topk=10, n_candidates=10)[0]
    assert chosen.tolist() == [list(range(49, 59)), list(range(50, 60))]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_key_that_is_no_number_in_the_coarse_level_is_left_to_the_indexer(value):
    inputs = case(SHAPES[0], 1, 1, 200, packed=False)
    index = {name: x for name, x in inputs.items() if not name.startswith("coarse")}
    best = index_topk(**index, topk=5)[0, 0]
    inputs["coarse_k_BSN"][:, best.long(), 3] = value
    assert torch.equal(two_level_topk(**inputs, topk=5, n_candidates=8)[0, 0], best)


def test_of_a_coarse_query_that_is_no_number_the_most_recent_keys_are_candidates():
    inputs = case(SHAPES[0], 1, 1, 100)
    inputs["coarse_q_BTMN"][..., 0] = torch.nan
    chosen = two_level_topk(**inputs, topk=6, n_candidates=6)
    assert chosen.tolist() == [[list(range(94, 100))]]


def test_a_key_beyond_the_interval_is_not_read():
    inputs = case(SHAPES[0], 1, 4, 120, packed=False, intervals=lambda b, t, s: causal(b, t, s - 20))
    expected = two_level_topk(**inputs, topk=6, n_candidates=30)
    inputs["coarse_k_BSN"][:, 100:] = torch.nan
    inputs["k_BSIE"][:, 100:] = torch.nan
    assert torch.equal(two_level_topk(**inputs, topk=6, n_candidates=30), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_candidates": 3}, "n_candidates=3 is less than topk=5; use a multiple of it"),
        ({"topk": 0}, "topk=0 cannot be; use an integer of at least 1"),
        ({"coarse_q_BTMN": torch.zeros(1, 2, 4, 7)}, "coarse_k_BSN has N=24, a tensor before it N=7"),
        ({"coarse_b_BTM": torch.zeros(1, 2, 3)}, "coarse_b_BTM has M=3, a tensor before it M=4"),
        ({"coarse_q_BTMN": torch.zeros(1, 3, 4, 24)}, "coarse_b_BTM has T=2, a tensor before it T=3"),
        ({"coarse_k_BSN": torch.zeros(1, 9, 24)}, "k_BSIE has S=60, a tensor before it S=9"),
        ({"coarse_q_BTMN": torch.zeros(1, 2, 4, 24, dtype=torch.int32)}, "coarse_q_BTMN has dtype"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change, message):
    inputs = {**case(SHAPES[0], 1, 2, 60), "topk": 5, "n_candidates": 20}
    with pytest.raises(ConfigError, match=message):
        two_level_topk(**{**inputs, **change})
