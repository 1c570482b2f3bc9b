"""The parity measurement on a tiny model: against the stock model, at its limits, and its traces."""

import json
import math

import pytest
import torch

from fulmen import CheckpointError, ConfigError, set_topk
from fulmen.data import TokenSequence
from fulmen.evaluation.parity.findings import needle_verdict, short_summary, source_verdict, verdict
from fulmen.evaluation.parity.losses import scored_positions, summarize_scores, text_scores
from fulmen.evaluation.parity.measure import measure_parity
from fulmen.evaluation.parity.needles import NeedleSample, score_by_forward
from fulmen.evaluation.parity.results import ParityResults
from fulmen.evaluation.parity.tables import needle_tables
from fulmen.evaluation.variants import ModelInput, indexer_state, last_hidden_states, swapped_indexers
from fulmen.modeling.mla.attention import fulmen_attention
from fulmen.modeling.selectors import dsa_attentions
from tests.evaluation.parity.tiny_parity import (
    LAYERS,
    LENGTH,
    TOPK,
    VOCAB,
    random_ids,
    tiny_dense,
    tiny_dsa,
    tiny_needles,
    tiny_v32,
    tiny_windows,
)

VARIANTS = ["dense", "oracle", "dsa", "inherited", "window", "random"]


def stock_losses(model, ids_T, position_T=None):
    """Loss of every next token by a plain forward pass of the whole model."""
    with torch.no_grad():
        logits = model(ids_T[None], position_ids=position_T, use_cache=False).logits[0, :-1].float()
    return torch.nn.functional.cross_entropy(logits, ids_T[1:], reduction="none")


def shaken(state):
    """Other indexers than the model's."""
    draw = torch.Generator().manual_seed(5)
    return {
        name: torch.randn(tensor.shape, generator=draw) if tensor.is_floating_point() else tensor.clone()
        for name, tensor in state.items()
    }


@pytest.fixture(scope="module")
def dense():
    return tiny_dense()


@pytest.fixture(scope="module")
def measured(dense):
    model = tiny_dsa(dense)
    calls = []
    result = measure_parity(
        model,
        tiny_windows(),
        inherited=shaken(indexer_state(model)),
        needles=tiny_needles(),
        dense_model=dense,
        progress=lambda *call: calls.append(call),
    )
    return result, calls


def test_result_is_plain_json(measured):
    result, _ = measured
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False)) == result.to_dict()
    assert (result.length, result.topk) == (LENGTH, TOPK)
    assert list(result.variants) == VARIANTS


def test_dense_variant_has_the_stock_models_losses(dense, measured):
    result, _ = measured
    for window, record in zip(tiny_windows(), result.windows, strict=True):
        losses = stock_losses(dense, window.input_ids)
        scores = record["scores"]["dense"]
        assert scores["second_half"] == pytest.approx(losses[LENGTH // 2 :].mean().item(), abs=1e-5)
        assert scores["by_position"][-1] == pytest.approx(losses[LENGTH * 7 // 8 :].mean().item(), abs=1e-5)
        assert (scores["kl"], scores["agreement"]) == (pytest.approx(0, abs=1e-6), 1)
    assert result.source["max_window_difference"] < 1e-5
    assert result.source["max_token_difference"] < 1e-4
    assert result.source["dsa_over_source"] == pytest.approx(result.variants["dsa"]["over_dense"], abs=1e-6)


def test_dsa_variant_has_the_models_own_losses(dense, measured):
    result, _ = measured
    losses = [
        stock_losses(tiny_dsa(dense), window.input_ids)[LENGTH // 2 :].mean() for window in tiny_windows()
    ]
    row = result.variants["dsa"]
    assert row["second_half"] == pytest.approx(torch.stack(losses).mean().item(), abs=1e-5)
    ratio = row["second_half"] / result.variants["dense"]["second_half"] - 1
    assert row["over_dense"]["estimate"] == pytest.approx(ratio)
    assert row["over_dense"]["low"] < ratio < row["over_dense"]["high"]
    assert {kind: found["n"] for kind, found in row["by_kind"].items()} == {"code": 2, "prose": 2}
    worse = max(row["by_kind"], key=lambda kind: row["by_kind"][kind]["over_dense"]["estimate"])
    assert row["worse_kind"] == worse


def test_the_inherited_variant_is_the_model_with_those_indexers(dense, measured):
    result, _ = measured
    model = tiny_dsa(dense)
    model.load_state_dict(shaken(indexer_state(model)), strict=False)
    window, record = tiny_windows()[1], measured[0].windows[1]
    losses = stock_losses(model, window.input_ids)[LENGTH // 2 :]
    assert record["scores"]["inherited"]["second_half"] == pytest.approx(losses.mean().item(), abs=1e-5)
    assert result.variants["inherited"]["second_half"] != result.variants["dsa"]["second_half"]


def test_sweep_mass_and_split(measured):
    result, _ = measured
    assert {point["k"] for point in result.sweep} == {TOPK // 4, TOPK // 2, TOPK, 2 * TOPK}
    assert list(result.attention_recall) == ["dsa", "inherited", "window"]
    for rows in result.attention_recall.values():
        assert [row["layer"] for row in rows] == list(range(LAYERS))
        assert all(row["captured"] <= row["oracle"] + 1e-6 for row in rows)
    split, variants = result.error_split, result.variants
    gap = variants["dsa"]["second_half"] - variants["dense"]["second_half"]
    assert split["budget"] + split["indexer"] == pytest.approx(gap)
    assert abs(split["kernel"]) < 1e-5
    assert split["kernel_topk"] < split["kernel_length"]


def test_sweep_reads_the_first_window_of_each_kind(dense, measured):
    result, _ = measured
    model = tiny_dsa(dense, topk=TOPK // 4)
    losses = [
        stock_losses(model, window.input_ids)[LENGTH // 2 :].mean().item() for window in tiny_windows()[:2]
    ]
    (point,) = (p for p in result.sweep if (p["variant"], p["k"]) == ("dsa", TOPK // 4))
    assert point["loss"] == pytest.approx(sum(losses) / 2, abs=1e-5)


def test_needles_are_counted_by_task_length_and_depth(measured):
    result, _ = measured
    cells = result.needles["cells"]
    assert len(cells) == 2 * 2 * 2 * 3
    assert {cell["task"] for cell in cells} == {"needle", "3 needles"}
    assert {cell["depth"] for cell in cells} == {0.0, 0.6}
    assert all(cell["n"] == 2 for cell in cells)
    assert set(result.needles["overall"]) == {"dense", "dsa", "window"}


def test_needle_difference_is_paired_and_in_points():
    samples = tiny_needles()[:4]
    answers = {"dense": [True, True, True, False], "dsa": [True, False, False, False]}
    tables = needle_tables(samples, answers)
    assert tables["dsa_minus_dense"]["estimate"] == -50
    assert -100 <= tables["dsa_minus_dense"]["low"] < -50 < tables["dsa_minus_dense"]["high"] <= 100
    assert (tables["overall"]["dense"]["right"], tables["overall"]["dsa"]["right"]) == (3, 1)
    assert tables["pairs"] == {"both": 1, "dense_only": 2, "dsa_only": 0, "neither": 1}
    assert tables["texts"] == 4


def test_questions_about_one_text_count_as_one_text_whatever_their_depths():
    prompt, answer = torch.arange(64), torch.arange(5)
    samples = [
        NeedleSample(prompt, answer, "12345", depth, length=64, n_keys=3, text=text)
        for text in range(2)
        for depth in (0.1, 0.5, 0.9)
    ]
    tables = needle_tables(samples, {"dense": [True] * 6, "dsa": [False] * 3 + [True] * 3})
    (row,) = tables["differences"]
    assert (row["texts"], tables["texts"]) == (2, 2)
    assert row["dsa_minus_dense"] == tables["dsa_minus_dense"]


def test_needle_answers_are_those_of_whole_forwards(dense, measured):
    result, _ = measured
    model = tiny_dsa(dense)
    right = [score_by_forward(model, sample) for sample in tiny_needles()]
    assert result.needles["overall"]["dsa"]["right"] == sum(right)
    assert [row["texts"] for row in result.needles["differences"]] == [2, 2, 4, 4]


def test_progress_counts_every_token_once(measured):
    _, calls = measured
    done = [call[0] for call in calls]
    assert done == sorted(set(done))
    assert all(total == done[-1] for _, total, _ in calls)


def test_nothing_is_left_behind(dense):
    model = tiny_dsa(dense)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    selectors = [attention.selector for attention in dsa_attentions(model)]
    measure_parity(model, tiny_windows(2), topk=5, inherited=shaken(indexer_state(model)), ks=[5])
    assert model.config.dsa["topk"] == TOPK
    assert [attention.selector for attention in dsa_attentions(model)] == selectors
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_indexers_come_back_after_an_error(dense):
    model = tiny_dsa(dense)
    before = {name: tensor.clone() for name, tensor in indexer_state(model).items()}
    other = shaken(before)
    with pytest.raises(KeyError), swapped_indexers(model, other):  # noqa: PT012
        assert all(torch.equal(tensor, other[name]) for name, tensor in indexer_state(model).items())
        raise KeyError
    assert all(torch.equal(tensor, before[name]) for name, tensor in indexer_state(model).items())


def test_k_above_the_length_makes_every_variant_dense(dense):
    model = tiny_dsa(dense)
    result = measure_parity(model, tiny_windows(2), topk=LENGTH, ks=[LENGTH])
    losses = [row["second_half"] for row in result.variants.values()]
    assert losses == [losses[0]] * len(losses)
    assert all(row["over_dense"]["estimate"] == 0 for row in result.variants.values())
    assert all(rows == [] for rows in result.attention_recall.values())
    assert verdict(result).startswith("Nothing was tested")


def test_stock_mla_models_are_measured_and_stay_stock():
    model = tiny_v32()
    window = tiny_windows(1)[0]
    result = measure_parity(model, tiny_windows(2), ks=[TOPK], needles=tiny_needles()[:2])
    assert [
        type(attention).__name__ for attention in model.modules() if "Attention" in type(attention).__name__
    ] == ["DeepseekV32Attention"] * LAYERS
    assert model.config.index_topk == TOPK
    with fulmen_attention(model):
        dsa = stock_losses(model, window.input_ids)[LENGTH // 2 :].mean().item()
    assert result.windows[0]["scores"]["dsa"]["second_half"] == pytest.approx(dsa, abs=1e-4)
    set_topk(model, LENGTH)
    dense = stock_losses(model, window.input_ids)[LENGTH // 2 :].mean().item()
    assert result.windows[0]["scores"]["dense"]["second_half"] == pytest.approx(dense, abs=1e-4)
    assert result.attention_recall["dsa"]


def test_packed_documents_do_not_see_each_other(dense):
    ids_T = random_ids(LENGTH)
    packed = ModelInput.of(TokenSequence(("a", "b"), "code", ids_T, (0, 30)))
    assert packed.position_T.tolist() == [*range(30), *range(50)]
    hidden_TC = last_hidden_states(tiny_dsa(dense, LENGTH), packed)
    alone_TC = last_hidden_states(dense, ModelInput(ids_T[30:], None))
    torch.testing.assert_close(hidden_TC[30:], alone_TC, rtol=1e-4, atol=1e-4)


def test_scores_of_known_logits(monkeypatch):
    monkeypatch.setattr("fulmen.evaluation.logits.CHUNK_LOGITS", 7 * VOCAB)
    draw = torch.Generator().manual_seed(0)
    ids_T, lm_head = random_ids(96), torch.nn.Linear(8, VOCAB, bias=False)
    hidden = {name: torch.randn(96, 8, generator=draw) for name in ("dense", "other")}
    scores = text_scores(hidden, lm_head, ids_T)["other"]
    rows = scored_positions(96)
    dense, other = (lm_head(hidden[name][rows]).log_softmax(-1) for name in ("dense", "other"))
    torch.testing.assert_close(
        scores.loss_P, torch.nn.functional.nll_loss(other, ids_T[rows + 1], reduction="none")
    )
    torch.testing.assert_close(scores.kl_P, (dense.exp() * (dense - other)).sum(-1))
    assert torch.equal(scores.agrees_P, dense.argmax(-1) == other.argmax(-1))
    means = summarize_scores(scores, 96)
    late = rows >= 48
    whole = (48 * scores.loss_P[~late].mean() + 47 * scores.loss_P[late].mean()) / 95
    assert means["whole"] == pytest.approx(whole.item(), abs=1e-6)


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        ([], "use at least one"),
        ([*tiny_windows(1), *tiny_windows(1, 90)], "lengths \\[80, 90\\]"),
        (tiny_windows(1, 63), "63 tokens are too short"),
    ],
)
def test_windows_must_be_of_one_sufficient_length(dense, windows, message):
    with pytest.raises(ConfigError, match=message):
        measure_parity(tiny_dsa(dense), windows)


def test_wrong_settings_are_typed_errors(dense):
    model = tiny_dsa(dense)
    with pytest.raises(ConfigError, match="topk=0"):
        measure_parity(model, tiny_windows(1), topk=0)
    with pytest.raises(ConfigError, match="ks=-1"):
        measure_parity(model, tiny_windows(1), ks=[4, -1])
    with pytest.raises(ConfigError, match="LlamaForCausalLM has no DSA"):
        measure_parity(dense, tiny_windows(1))
    state = indexer_state(model)
    name = next(iter(state))
    with pytest.raises(ConfigError, match="differ in 1 tensors, the first model"):
        measure_parity(model, tiny_windows(1), inherited={key: state[key] for key in state if key != name})
    with pytest.raises(ConfigError, match="has shape \\(1,\\)"):
        measure_parity(model, tiny_windows(1), inherited={**state, name: torch.zeros(1)})


def test_nan_weights_are_named():
    model = tiny_dsa(tiny_dense())
    model.lm_head.weight.data[3, 0] = math.nan
    with pytest.raises(CheckpointError, match="loss of dense on text 0 is nan"):
        measure_parity(model, tiny_windows(1))


@pytest.mark.parametrize(
    ("low", "estimate", "high", "words"),
    [
        (-0.01, 0.002, 0.009, "Parity: "),
        (-0.01, 0.008, 0.02, "Not shown: "),
        (0.02, 0.03, 0.04, "No parity: "),
        (None, 0.001, None, "Not shown: "),
        (-0.03, -0.02, -0.01, "2.00 % below dense"),
    ],
)
def test_verdict_follows_the_interval_of_the_worse_kind(low, estimate, high, words):
    over = {"estimate": estimate, "low": low, "high": high}
    fine = {"estimate": -0.5, "low": -0.6, "high": -0.4}
    row = {"worse_kind": "code", "by_kind": {"code": {"over_dense": over}, "prose": {"over_dense": fine}}}
    # Of answers none is lost.
    gap = {"estimate": 0.0, "low": -2.0, "high": 2.0}
    pairs = {"both": 100, "dense_only": 0, "dsa_only": 0, "neither": 2}
    needles = {"pairs": pairs, "dsa_minus_dense": gap}
    text = verdict(ParityResults(100, 10, [], {"dsa": row}, {}, [], {}, needles, None))
    assert words in text
    assert "code text, the worse kind" in text


def test_summary_has_one_row_per_variant(measured):
    result, _ = measured
    header, *rows = short_summary(result)
    assert [len(row) for row in rows] == [len(header)] * len(VARIANTS)
    assert rows[0][:3] == ("dense", f"{result.variants['dense']['second_half']:.4f}", "")
    assert "of 16 questions about 12 texts" in needle_verdict(result)
    assert "before conversion" in source_verdict(result)
