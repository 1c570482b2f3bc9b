"""What a coarse level costs: on a tiny model, against whole forward passes and the reference."""

import json
from itertools import pairwise

import pytest
import torch

from fulmen.config import DsaConfig
from fulmen.evaluation.controls import CandidateRecallSelector, attention_of_rows
from fulmen.evaluation.journal import Journal
from fulmen.evaluation.parity.coarse_level import coarse_table
from fulmen.evaluation.parity.findings import coarse_verdict
from fulmen.evaluation.parity.measure import measure_parity
from fulmen.evaluation.parity.plots import parity_plots
from fulmen.evaluation.parity.report import ParityReport
from fulmen.evaluation.statistics import mean_interval
from fulmen.evaluation.variants import telling_topk
from fulmen.modeling.families import family_for_type
from fulmen.modeling.selectors import OneLevelSelector, Selector, use_selector
from fulmen.ops.dispatch import pin_backend
from fulmen.ops.scores import index_scores
from fulmen.ops.topk import select_topk
from tests.evaluation.parity.tiny_parity import (
    LENGTH,
    random_ids,
    tiny_dense,
    tiny_dsa,
    tiny_windows,
)

# Candidates are chosen of more than 4 x 2 x k tokens: of the text's 80 at k = 5, and at k = 20 of none.
FACTOR, TOPK, FEW = 2, 20, 5


def two_level_model(shares=()):
    torch.manual_seed(1)
    shape = DsaConfig(
        TOPK, 4, 2, 8, (0, 1), shares, coarse_head_dim=8, coarse_n_heads=4, candidate_factor=FACTOR
    )
    return family_for_type("llama").from_dense(tiny_dense(), shape)


def losses(model, selector=None):
    """Mean loss of every text's second half, by plain forward passes."""
    found = []
    for window in tiny_windows():
        ids = window.input_ids
        with torch.no_grad(), use_selector(model, selector or model.model.layers[0].self_attn.selector):
            logits = model(ids[None], use_cache=False).logits[0, LENGTH // 2 : -1].float()
        found.append(torch.nn.functional.cross_entropy(logits, ids[LENGTH // 2 + 1 :]).item())
    return found


def at_few(model):
    model.config.dsa = {**model.config.dsa, "topk": FEW}
    return model


@pytest.fixture(scope="module")
def asked():
    """At a k that asks the coarse level, whose layers share k unevenly."""
    return measure_parity(two_level_model((0.6, 1.4)), tiny_windows(), topk=FEW, ks=[FEW])


@pytest.fixture(scope="module")
def not_asked():
    return measure_parity(two_level_model(), tiny_windows(), ks=[TOPK])


def test_the_gap_is_that_of_whole_forward_passes(asked):
    model = at_few(two_level_model((0.6, 1.4)))
    two, one = losses(model), losses(model, OneLevelSelector())
    assert asked.coarse["two_levels"] == pytest.approx(sum(two) / 4, abs=1e-5)
    assert asked.coarse["one_level"] == pytest.approx(sum(one) / 4, abs=1e-5)
    assert two != one
    expected = mean_interval([x - y for x, y in zip(two, one, strict=True)])
    assert list(asked.coarse["gap"].values()) == pytest.approx(list(expected), abs=1e-5)
    assert asked.coarse["over_one_level"]["estimate"] == pytest.approx(sum(two) / sum(one) - 1, abs=1e-5)
    assert (asked.coarse["k"], asked.coarse["candidates"], asked.coarse["asked_from"]) == (5, 10, 40)


def test_the_split_has_a_term_for_it(asked):
    split, loss = asked.error_split, {name: row["second_half"] for name, row in asked.variants.items()}
    steps = ["dense", "oracle", "dsa_equal", "one_level", "dsa"]
    terms = [split[name] for name in ("budget", "indexer", "split_of_k", "coarse")]
    assert terms == pytest.approx([loss[after] - loss[before] for before, after in pairwise(steps)])
    model = at_few(two_level_model())
    assert loss["dsa_equal"] == pytest.approx(sum(losses(model, OneLevelSelector())) / 4, abs=1e-5)


def test_where_its_own_k_asks_nothing_a_smaller_one_tells(not_asked):
    assert (not_asked.coarse["k"], not_asked.coarse["asked_from"]) == (5, 40)
    assert "one_level" not in not_asked.variants
    assert "coarse" not in not_asked.error_split
    assert list(not_asked.attention_recall) == ["dsa", "window"]
    model = at_few(two_level_model())
    assert not_asked.coarse["two_levels"] == pytest.approx(sum(losses(model)) / 4, abs=1e-5)
    said = coarse_verdict(not_asked)
    assert "at k = 5, as at k = 20 both levels are one up to 160 tokens: of more than 40 tokens" in said


class Compared(Selector):
    """Selects in one level and works out what candidates hold, key by key."""

    def __init__(self):
        self.sums = {}

    def select(self, inputs, topk):
        coarse, n_keys = inputs.coarse, inputs.k_BSGD.shape[1]
        ends = (inputs.start_BT, inputs.stop_BT)
        ones = torch.ones_like(coarse.b_BTM)
        with pin_backend("reference"):
            first = index_scores(coarse.q_BTMN, coarse.k_BSX[:, :, None], ones, coarse.b_BTM, *ends)
            index = (inputs.index_q_BTJE, inputs.index_k_BSIE, inputs.index_w_BTJ, inputs.index_b_BTJ)
            second = index_scores(*index, *ends)
        probs_TS = attention_of_rows(inputs, 0, slice(None))
        kept = {"candidates": [], "two_levels": [], "one_level": [], "oracle": []}
        for t in range(4 * coarse.n_candidates, n_keys):
            assert int(inputs.stop_BT[0, t]) == t + 1
            candidates = first[0, t, : t + 1].topk(coarse.n_candidates).indices
            best = second[0, t, candidates].topk(topk).indices
            kept["candidates"].append(probs_TS[t, candidates].sum())
            kept["two_levels"].append(probs_TS[t, candidates[best]].sum())
            kept["one_level"].append(probs_TS[t, second[0, t, : t + 1].topk(topk).indices].sum())
            kept["oracle"].append(probs_TS[t].topk(topk).values.sum())
        self.sums[inputs.layer_idx] = {name: torch.stack(x).mean().item() for name, x in kept.items() if x}
        return select_topk(second, *ends, topk)


def test_what_candidates_hold_by_layer_is_the_references(asked):
    model, ids = at_few(two_level_model((0.6, 1.4))), random_ids(LENGTH)
    recalls, compared = CandidateRecallSelector(stride=1), Compared()
    for selector in (recalls, compared):
        with torch.no_grad(), use_selector(model, selector):
            model(ids[None], use_cache=False)
    rows = {row.layer: row._asdict() for row in recalls.result()}
    assert list(rows) == [0, 1]
    for layer, expected in compared.sums.items():
        assert {**expected, "layer": layer} == pytest.approx(rows[layer], abs=1e-5)
    for row in asked.coarse["layers"]:
        assert row["two_levels"] <= row["candidates"] + 1e-6
        assert max(row["two_levels"], row["one_level"]) <= row["oracle"] + 1e-6


def test_it_is_read_everywhere(asked):
    assert "candidates" in [plot.name for plot in parity_plots(asked)]
    said = coarse_verdict(asked)
    assert "at k = 5: of more than 40 tokens it chooses 10 candidates" in said
    assert "Candidates hold" in said
    assert said in asked.findings()
    page, text = asked.to_html(), asked.to_markdown()
    assert "coarse level: two levels − one" in page
    for words in ("10 candidates", "DSA without the coarse level", "Coarse level, at k = 5"):
        assert words in page
        assert words in text
    assert ParityReport.from_dict(json.loads(json.dumps(asked.to_dict()))) == asked


def test_a_model_of_one_level_has_nothing_of_it():
    model = tiny_dsa(tiny_dense(), topk=1)
    result = measure_parity(model, tiny_windows(1), ks=[])
    assert result.coarse is None
    assert coarse_verdict(result) == ""
    assert "one_level" not in result.variants
    assert telling_topk(model, 1, LENGTH) is None
    assert "oarse" not in result.to_markdown() + result.to_html()


def test_texts_too_short_for_any_k_are_not_asked():
    assert telling_topk(two_level_model(), TOPK, 15) is None
    assert telling_topk(two_level_model(), TOPK, 16) == 1
    assert telling_topk(two_level_model(), TOPK, 160) == 10
    assert telling_topk(two_level_model(), TOPK, 161) == 20


def test_an_interrupted_run_has_the_same_table(not_asked, tmp_path):
    path = tmp_path / "journal.jsonl"

    def stop(done, total, what):
        if done > 5 * 4 * LENGTH + 6 * LENGTH:
            raise KeyboardInterrupt

    def measured(progress):
        journal = Journal(path, {"model": "tiny"})
        return measure_parity(
            two_level_model(), tiny_windows(), ks=[TOPK], journal=journal, progress=progress
        )

    with pytest.raises(KeyboardInterrupt):
        measured(stop)
    tasks = [json.loads(line)["key"][1] for line in path.read_text().splitlines()[1:]]
    assert "levels 5" in tasks
    assert measured(lambda done, total, what: None) == not_asked


def test_one_text_has_no_interval():
    scores = {name: {"second_half": loss} for name, loss in (("dsa", 2.1), ("one_level", 2.0))}
    text = {"record": {"scores": scores}, "recalls": {"one_level": [[3, 2.0, 1.8, 1.0, 1.2, 1.4]]}}
    dsa = DsaConfig(8, 4, 2, 8, (0,), coarse_head_dim=8, coarse_n_heads=4)
    table = coarse_table(dsa, 8, [text])
    assert table["gap"] == {"estimate": pytest.approx(0.1), "low": None, "high": None}
    (row,) = table["layers"]
    assert row == {"layer": 3, "candidates": 0.9, "two_levels": 0.5, "one_level": 0.6, "oracle": 0.7}
