"""Splits of k tried on the model itself: the one that answers best is kept."""

import pytest
import torch

from fulmen.modeling.families import dsa_family_for, dsa_of
from fulmen.modeling.family import AnsweredText
from fulmen.modeling.gqa.calibration import positions_to_read
from fulmen.modeling.gqa.inherit import inherit_gqa
from fulmen.modeling.gqa.model import set_topk_ratios
from fulmen.modeling.gqa.topk_trial import CLEARLY_LESS, try_topk_ratios
from fulmen.modeling.selectors import DenseSelector, use_selector
from tests.modeling.gqa.tiny_gqa import make_dense, make_dsa, random_ids

TOPK, LENGTH = 8, 64
FITTED = (2.0, 0.5, 0.5)
HALFWAY = (1.5, 0.75, 0.75)
EVEN = (1.0, 1.0, 1.0)
ROWS = torch.tensor([50, 51, 60])


@pytest.fixture
def model():
    model = make_dsa(make_dense("qwen3"), TOPK)
    inherit_gqa(model, random_ids(2, LENGTH), TOPK)
    set_topk_ratios(model, FITTED)
    return model.eval()


def texts(count=2):
    return [AnsweredText(ids, ROWS) for ids in random_ids(count, LENGTH, seed=5)]


@torch.no_grad()
def change_at_answers(model, ratios) -> float:
    """By its formula, KL(dense || sparse) of the next token, from whole logits."""
    set_topk_ratios(model, ratios)
    found = []
    for text, position_T in zip(texts(), positions_to_read(model, 2, LENGTH), strict=True):
        ids_BT = text.ids_T[None]
        read = {
            "attention_mask": torch.ones_like(ids_BT),
            "position_ids": position_T[None],
            "use_cache": False,
        }
        sparse = model(ids_BT, **read).logits[0, ROWS].float().log_softmax(-1)
        with use_selector(model, DenseSelector()):
            dense = model(ids_BT, **read).logits[0, ROWS].float().log_softmax(-1)
        found.append((dense.exp() * (dense - sparse)).sum(-1).mean())
    return float(torch.stack(found).mean())


def test_the_three_splits_and_what_they_change(model):
    seen = []
    tried = try_topk_ratios(model, texts(), lambda done, total: seen.append((done, total)))
    assert {split.ratios for split in tried} == {EVEN, HALFWAY, FITTED}
    assert seen == [(done, 8) for done in range(9)]
    for split in tried:
        assert split.kl_answers == pytest.approx(change_at_answers(model, split.ratios), abs=1e-6)


def test_the_split_with_the_least_change_is_kept_and_the_fitted_one_if_it_is_nearly_that(model):
    tried = try_topk_ratios(model, texts())
    assert dsa_of(model.config).topk_shares == tried[0].ratios
    even = next(split for split in tried if split.ratios == EVEN)
    sums = [
        (split.kl_text / even.kl_text + split.kl_answers / even.kl_answers)
        * (CLEARLY_LESS if split.ratios == FITTED else 1)
        for split in tried
    ]
    assert sums == sorted(sums)


def test_nothing_is_tried_where_there_is_nothing_to_choose(model):
    family = dsa_family_for(model.config)
    assert family.try_topk(model, []) == []
    assert dsa_of(model.config).topk_shares == FITTED
    set_topk_ratios(model, EVEN)
    assert family.try_topk(model, texts()) == []


def test_short_texts_are_read_with_a_k_of_their_length(model):
    """k = 8 of 64 tokens would hardly be felt; the model has its own k afterwards."""
    tried = dsa_family_for(model.config).try_topk(model, texts())
    assert dsa_of(model.config).topk == TOPK
    dsa_family_for(model.config).set_topk(model, LENGTH // 16)
    even = next(split for split in tried if split.ratios == EVEN)
    assert even.kl_answers == pytest.approx(change_at_answers(model, EVEN), abs=1e-6)
