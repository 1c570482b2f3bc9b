"""Two levels by the paged Triton kernels, against the specification: on a GPU, or interpreted."""

import dataclasses

import pytest
import torch

from fulmen import ConfigError
from fulmen.ops.common.index_keys import pack_index_keys, unpack_index_keys
from fulmen.ops.dispatch import pin_backend
from fulmen.ops.paged.layer import store_tokens
from fulmen.ops.topk.reference import select_topk_reference
from tests.ops.ops_cases import assert_near, normal
from tests.ops.paged.request_cases import (
    COARSE_APART,
    DEVICE,
    PADDING,
    REQUEST_SHAPES,
    REQUEST_STEPS,
    attended,
    request_case,
    rows_in,
    there,
)
from tests.ops.paged.test_paged_decode import SHAPES
from tests.ops.paged.test_paged_two_level import coarse_copied, coarse_decode_case

TOPK, DENSE_UP_TO = 6, 9
# M, N, C, from how many keys on. Of tiles of 32, 8 candidates are chosen in rounds, 12 by counting.
FEW, MANY = (5, 6, 8, 20), (3, 24, 12, 20)
pytestmark = pytest.mark.usefixtures("triton_runs")


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    ("step", "shape", "dtype", "coarse"),
    [
        (REQUEST_STEPS["decodes"], REQUEST_SHAPES[0], torch.float32, MANY),
        (REQUEST_STEPS["drafts"], REQUEST_SHAPES[2], torch.bfloat16, FEW),
        ([(1, 50), (9, 44), (1, 3), (9, 9)], REQUEST_SHAPES[3], torch.float32, MANY),
        (REQUEST_STEPS["padded"], REQUEST_SHAPES[1], torch.float32, MANY),
    ],
    ids=str,
)
def test_a_step_is_that_of_the_reference(step, shape, dtype, coarse):
    """Some queries keep all keys, some have all as candidates, some have them chosen."""
    case = request_case(shape, step, TOPK, DENSE_UP_TO, dtype, coarse)
    expected = attended("reference", *case)
    assert not expected[-PADDING:].any()
    assert_near(attended("triton", *map(there, case)).cpu(), expected, dtype)
    one_level = dataclasses.replace(case[0], coarse=None)
    index = case[3]._replace(coarse_q_TMN=None, coarse_b_TM=None)
    assert (expected - attended("reference", one_level, *case[1:3], index)).abs().max() > 0.01


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    ("kind", "n_candidates"), [("numbers", 9), ("plateaus", 38), ("infinite", 9), ("plateaus", 9)]
)
def test_candidates_are_chosen_by_the_rule(kind, n_candidates):
    """Parts of 32: of 150 keys five count; some of the equal ones that are taken lie in several."""
    from fulmen.ops.paged.triton_blocks import Queries
    from fulmen.ops.paged.triton_candidates import choose_candidates

    step = [(2, 150), (1, 64), (1, 38), (0, 0)]
    _, requests, *_ = request_case(REQUEST_SHAPES[1], step, TOPK, TOPK)
    numbers = normal(4, 150)
    scores = {
        "numbers": numbers,
        "plateaus": numbers.relu().round() * -1,
        "infinite": torch.where(numbers > 0.5, torch.inf, numbers.round()),
    }[kind]
    stop = torch.tensor([149, 150, 64, 38])
    poisoned = torch.where(torch.arange(150) < stop[:, None], scores, torch.inf).to(DEVICE)
    chosen = torch.full((4, n_candidates), -7, dtype=torch.int32, device=DEVICE)
    choose_candidates(poisoned, Queries(there(requests), slice(0, 4), 38, 150), chosen)
    expected = select_topk_reference(scores[None], torch.zeros(1, 4).long(), stop[None], n_candidates)[0]
    assert torch.equal(chosen[:3].cpu(), expected[:3])
    assert (chosen[3] == -7).all()  # sees too few


@pytest.mark.usefixtures("small_tiles")
def test_prompts_are_selected_for_some_tokens_at_a_time(monkeypatch):
    from fulmen.ops.paged import triton_requests

    case = request_case(REQUEST_SHAPES[3], [(1, 24), (4, 40)], TOPK, DENSE_UP_TO, coarse=MANY)
    layer, requests, _, index = map(there, case)
    expected = triton_requests.select_keys(layer, requests, index)[:5]
    monkeypatch.setattr(triton_requests, "HELD_PAGED_SCORES", 3 * 40)
    assert torch.equal(triton_requests.select_keys(layer, requests, index)[:5], expected)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_key_that_is_no_number_in_the_coarse_level_is_left_to_the_indexer(value):
    from fulmen.ops.paged.triton_requests import select_keys

    case = request_case(REQUEST_SHAPES[1], [(1, 90)], TOPK, DENSE_UP_TO, coarse=MANY)
    layer, requests, _, index = map(there, case)
    one_level = dataclasses.replace(layer, coarse=None)
    best_K = select_keys(one_level, requests, index._replace(coarse_q_TMN=None, coarse_b_TM=None))[0]
    assert not torch.equal(select_keys(layer, requests, index)[0], best_K)
    rows_K = rows_in(case[1], 0, best_K.cpu().long(), COARSE_APART).to(DEVICE)
    layer.coarse.packed_RX[rows_K] = pack_index_keys(torch.full((1, 1, MANY[1]), value))[0].to(DEVICE)
    assert torch.equal(select_keys(layer, requests, index)[0], best_K)


@pytest.mark.usefixtures("small_tiles")
def test_a_coarse_query_that_is_no_number_leaves_the_most_recent_keys():
    from fulmen.ops.paged.triton_requests import select_keys

    layer, requests, _, index = request_case(
        REQUEST_SHAPES[1], [(2, 90)], TOPK, DENSE_UP_TO, coarse=(3, 24, TOPK, 20)
    )
    index.coarse_q_TMN[1, 0, 3] = torch.nan
    chosen_TK = select_keys(*map(there, (layer, requests)), there(index))
    assert chosen_TK[1].tolist() == list(range(90 - TOPK, 90))


@pytest.mark.parametrize(
    ("shape", "dtype"), [(SHAPES[0], torch.float32), (SHAPES[2], torch.bfloat16)], ids=str
)
def test_coarse_keys_are_stored_to_the_bit_and_padding_is_not(shape, dtype):
    layer, (_, tokens, _), _ = coarse_decode_case(shape, 300, 8, 8, dtype, 24, 40)
    names = ("q", "k", "v", "index_q", "index_k", "coarse_q", "coarse_k")
    heads = [normal(2, *layer.shapes[name], seed=i, dtype=dtype) for i, name in enumerate(names)]
    heads[-1][0, 1] = torch.nan
    ours = there(coarse_copied(layer))
    with pin_backend("torch"):
        expected = store_tokens(layer, tokens, *heads)
    with pin_backend("triton"):
        found = store_tokens(ours, there(tokens), *map(there, heads))
        beyond = {name: getattr(tokens, name) - 10**6 for name in ("rows_T", "index_rows_T", "coarse_rows_T")}
        nowhere = there(dataclasses.replace(tokens, **beyond))
        store_tokens(ours, nowhere, *map(there, [2 * x for x in heads]))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.cpu(), other)
    numbers = [unpack_index_keys(x.coarse.packed_RX.cpu()).nan_to_num(-7) for x in (ours, layer)]
    assert torch.equal(*numbers)


def test_a_step_that_asks_the_coarse_level_needs_its_queries():
    layer, requests, q_THD, index = request_case(REQUEST_SHAPES[1], [(1, 30)], TOPK, DENSE_UP_TO, coarse=FEW)
    bare = index._replace(coarse_q_TMN=None, coarse_b_TM=None)
    with pytest.raises(ConfigError, match=r"index\.coarse_q_TMN is missing; the layer has one coarse level"):
        attended("triton", layer, requests, q_THD, bare)
    with pytest.raises(ConfigError, match=r"index\.coarse_b_TM has shape \(4, 4\)"):
        attended("triton", layer, requests, q_THD, index._replace(coarse_b_TM=index.coarse_b_TM[:, 1:]))


def test_where_no_query_sees_so_many_keys_the_coarse_level_is_not_asked():
    case = request_case(REQUEST_SHAPES[1], [(1, 20), (2, 18)], TOPK, DENSE_UP_TO, coarse=FEW)
    layer, requests, q_THD, index = map(there, case)
    index = index._replace(coarse_q_TMN=None, coarse_b_TM=None)
    alone = attended("triton", dataclasses.replace(layer, coarse=None), requests, q_THD, index)
    assert torch.equal(attended("triton", layer, requests, q_THD, index), alone)


def test_what_a_step_takes_is_reserved_with_what_its_coarse_level_takes():
    from fulmen.ops.paged.requests import StepBounds
    from fulmen.ops.paged.triton_requests import selection_bytes

    one_level = StepBounds(512, 512, 131072, 8)
    two_levels = one_level._replace(n_candidates=4096, coarse_from=16384)
    # Scores of all keys, of those that are scored without candidates; counts of 16 parts; positions.
    least = 4 * (131072 + 16384 + 4096) + 16 * 4 * 256 * 2
    assert least < selection_bytes(two_levels) < 1.1 * least
    assert selection_bytes(two_levels._replace(most_keys=16384)) == selection_bytes(
        one_level._replace(most_keys=16384)
    )
