"""Layers that share the budget of k keys unevenly: how it is split, and that k means the same as before."""

from functools import partial

import numpy as np
import pytest
import torch

from fulmen import set_topk
from fulmen.config import DsaConfig
from fulmen.errors import ConfigError
from fulmen.modeling.cost import decode_cost, token_bytes
from fulmen.modeling.gqa.cache import DsaCache
from fulmen.modeling.gqa.model import set_topk_ratios
from fulmen.modeling.gqa.topk_ratios import (
    LEAST_RATIO,
    TRIED_RATIOS,
    fit_topk_ratios,
    least_error_ratios,
    measure_topk_errors,
)
from fulmen.modeling.selectors import IndexerSelector, keep_short_pasts, use_selector
from tests.modeling.gqa.tiny_gqa import FAMILIES, make_dense, make_dsa, random_ids

TOPK, LENGTH = 8, 60
UNEVEN = (2.0, 0.5, 0.5)


@pytest.fixture
def model():
    model = make_dsa(make_dense("qwen3"), TOPK)
    set_topk_ratios(model, UNEVEN)
    return model


class Widths(IndexerSelector):
    def __init__(self):
        self.seen = {}

    def select(self, inputs, topk):
        self.seen[inputs.layer_idx] = topk
        return super().select(inputs, topk)


@torch.no_grad()
def test_each_layer_selects_its_share_at_any_k(model):
    widths = Widths()
    for topk in (TOPK, 2 * TOPK):
        set_topk(model, topk)
        with use_selector(model, widths):
            model(random_ids(1, LENGTH), use_cache=False)
        assert widths.seen == {0: 2 * topk, 1: topk // 2, 2: topk // 2}


@torch.no_grad()
def test_at_k_of_the_length_the_model_is_dense_and_below_it_is_not(model):
    dense, ids = make_dense("qwen3"), random_ids(2, LENGTH)
    expected = dense(ids, use_cache=False).logits
    set_topk(model, LENGTH)
    torch.testing.assert_close(model(ids, use_cache=False).logits, expected, atol=2e-4, rtol=2e-4)
    set_topk(model, LENGTH - 1)
    got = model(ids, use_cache=False).logits
    torch.testing.assert_close(got[:, :-1], expected[:, :-1], atol=2e-4, rtol=2e-4)
    assert not torch.allclose(got[:, -1], expected[:, -1], atol=2e-4)


@torch.no_grad()
def test_whole_chunked_token_by_token_and_padded_agree(model):
    ids = random_ids(1, LENGTH)
    whole = model(ids, use_cache=False).logits
    for chunk in (1, 7, 25):
        cache = DsaCache(model.config)
        parts = [model(part, past_key_values=cache).logits for part in ids.split(chunk, dim=1)]
        torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-4, rtol=1e-4)
    padded = torch.cat((torch.zeros(1, 5, dtype=torch.int64), ids), 1)
    mask = (torch.arange(LENGTH + 5) >= 5).long()[None]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    got = model(padded, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, 5:]
    torch.testing.assert_close(got, whole, atol=1e-4, rtol=1e-4)


def test_short_pasts_are_kept_whole_and_nothing_else_changes():
    start = torch.tensor([[0, 0, 2, 0, -3]])
    stop = torch.tensor([[2, 4, 7, 6, 1]])
    selected = torch.tensor([[[0, 1], [1, 3], [3, 6], [2, 5], [0, -1]]], dtype=torch.int32)
    kept = keep_short_pasts(selected, start, stop, dense_up_to=5)
    assert kept.dtype == torch.int32
    expected = [[0, 1], [0, 1, 2, 3], [2, 3, 4, 5, 6], [2, 5], [0]]
    assert [[key for key in row if key >= 0] for row in kept[0].tolist()] == expected
    assert keep_short_pasts(selected, start, stop, dense_up_to=2) is selected


def test_the_split_gives_more_to_whom_more_helps_at_the_same_mean():
    tried = np.array(TRIED_RATIOS)
    errors = np.stack([10 / tried, 1 / tried, 0.1 / tried])
    shares = least_error_ratios(errors, tried)
    assert sum(shares) / 3 == pytest.approx(1)
    assert shares[0] > shares[1] > shares[2] >= LEAST_RATIO
    assert least_error_ratios(errors[[1, 1, 1]], tried) == (1.0, 1.0, 1.0)


def test_the_split_is_the_best_of_its_grid():
    rng = np.random.default_rng(0)
    tried = np.array(TRIED_RATIOS)
    errors = rng.uniform(0.1, 3, (2, 1)) * tried ** -rng.uniform(0.5, 2, (2, 1))

    def total(share):
        powers = [
            np.exp(np.interp(np.log(s), np.log(tried), np.log(e))) for s, e in zip(share, errors, strict=True)
        ]
        return sum(powers)

    every = [(x, 2 - x) for x in np.arange(0.5, 1.51, 0.125)]
    assert total(least_error_ratios(errors, tried)) == pytest.approx(min(map(total, every)))


def hooks_of(model):
    return [dict(module._forward_pre_hooks) for module in model.modules()]


@pytest.mark.parametrize("name", FAMILIES)
def test_measured_shares_fit_the_model(name):
    model = make_dsa(make_dense(name), TOPK)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    hooks = hooks_of(model)
    shares = fit_topk_ratios(model, random_ids(2, 64), TOPK)
    assert len(shares) == len(model.config.dsa["layers"])
    assert sum(shares) / len(shares) == pytest.approx(1)
    set_topk_ratios(model, shares)
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    assert hooks_of(model) == hooks


def test_a_factor_that_a_norm_takes_away_changes_no_share():
    """Gemma's layers norm what the attention adds to the stream: its own size says nothing."""
    shares = []
    for factor in (1, 100):
        model = make_dsa(make_dense("gemma3"), TOPK)
        with torch.no_grad():
            model.model.layers[0].self_attn.o_proj.weight.mul_(factor)
        shares.append(fit_topk_ratios(model, random_ids(2, 64), TOPK))
    assert shares[0] == shares[1]
    assert shares[0][0] != shares[0][1]


def test_what_a_layer_loses_is_what_its_own_index_does_not_find():
    errors = {}
    for width in (4, 16):
        model = make_dsa(make_dense(), TOPK, head_dim=width)
        errors[width] = []
        note = partial(lambda found, _, error: found.append(error), errors[width])
        measure_topk_errors(model, random_ids(4, 96), TOPK, [1.0, 2.0], note)
    narrow_LK, whole_LK = (torch.tensor(errors[width]) for width in (4, 16))
    assert (narrow_LK > 1.1 * whole_LK).all()
    assert (whole_LK[:, 0] > whole_LK[:, 1]).all()


def test_a_text_without_room_for_twice_k_gives_even_shares():
    model = make_dsa(make_dense(), TOPK)
    assert set(fit_topk_ratios(model, random_ids(1, 2 * TOPK), TOPK)) == {1.0}


@pytest.mark.parametrize("shares", [(1.0, 1.0), (2.0, 2.0, 2.0), (3.0, 0.0, 0.0), (4.0, -0.5, -0.5)])
def test_shares_that_cannot_be(model, shares):
    with pytest.raises(ConfigError, match="topk_shares="):
        set_topk_ratios(model, shares)


def test_saved_and_loaded(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert DsaConfig.from_dict(loaded.config.dsa).topk_shares == UNEVEN
    ids = random_ids(1, LENGTH)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_the_cost_is_that_of_an_even_split(model):
    dsa = DsaConfig.from_dict(model.config.dsa)
    even = DsaConfig.from_dict({**model.config.dsa, "topk_shares": ()})
    assert decode_cost(model.config, dsa, 1000) == decode_cost(model.config, even, 1000)
    # Layer 0 keeps 16 keys, so up to there it reads what is there and scores nothing.
    at = decode_cost(model.config, dsa, 12)
    kv, key = (size / 3 for size in token_bytes(model.config, dsa))
    assert at.dsa_bytes == pytest.approx((12 + 4 + 4) * kv + key + 2 * 12 * key)
