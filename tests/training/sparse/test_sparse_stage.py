"""The sparse stage's losses: who learns from which, packing, checkpointing, schedules."""

import pytest
import torch

from fulmen.config import DsaConfig
from fulmen.errors import ConfigError
from fulmen.modeling.families import accelerated, family_for
from fulmen.training.rows import NO_LABEL, next_tokens, sequence_row, target_row
from fulmen.training.sparse.run import prepare_stage
from fulmen.training.sparse.schedule import TopkSchedule
from fulmen.training.sparse.settings import SparseSettings
from fulmen.training.sparse.teacher import TARGET_KEYS, Teacher
from tests.modeling.gqa.tiny_gqa import FAMILIES, make_dense, make_dsa, random_ids
from tests.modeling.mla.tiny_mla import make_mla, mla_ids
from tests.training.sparse.sparse_setup import LENGTH, TOPK, TRAIN, fresh_model, packed_window, settings


def batch_of(model, *texts, top_n=16):
    rows = [target_row(text) for text in texts]
    targets = [Teacher(model, top_n).targets(row) for row in rows]
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    return batch | {
        key: torch.stack([one[place] for one in targets]) for place, key in enumerate(TARGET_KEYS)
    }


def gradients(stage, batch, loss="loss", seed=3):
    stage.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    stage.train()(**batch)[loss].backward()
    return {name: p.grad.clone() for name, p in stage.named_parameters() if p.grad is not None}


def of_indexer(name: str) -> bool:
    return ".indexer." in name


@pytest.mark.parametrize("kind", ["kl", "output", "both"])
def test_no_gradient_crosses(kind, monkeypatch):
    """Each side's gradient has the same bits with the other side's loss switched off."""
    model = fresh_model()
    batch = batch_of(model, TRAIN[0])
    stage = prepare_stage(model, settings(indexer_loss=kind))
    both = gradients(stage, batch)
    assert {of_indexer(name) for name in both} == {True, False}
    # The trunk's loss off: every weight outside the indexers is without gradient.
    trunk_losses = stage._backbone_losses
    monkeypatch.setattr(
        stage, "_backbone_losses", lambda *given: trunk_losses(*given)._replace(loss=torch.zeros(()))
    )
    indexer_only = gradients(stage, batch)
    assert all(of_indexer(name) for name in indexer_only)
    monkeypatch.undo()
    # The indexer's loss off.
    select = type(stage.taps).select

    def without_loss(inputs, topk):
        chosen = select(stage.taps, inputs, topk)
        stage.taps.layers.clear()
        return chosen

    monkeypatch.setattr(stage.taps, "select", without_loss)
    trunk_only = gradients(stage, batch)
    assert not any(of_indexer(name) for name in trunk_only)
    assert indexer_only.keys() | trunk_only.keys() == both.keys()
    for name, gradient in both.items():
        assert torch.equal(gradient, (indexer_only if of_indexer(name) else trunk_only)[name]), name


@pytest.mark.parametrize("name", FAMILIES)
def test_every_weight_learns_in_every_family(name):
    dense = make_dense(name)
    model = make_dsa(dense, topk=TOPK)
    batch = batch_of(model, random_ids(1, LENGTH)[0])
    got = gradients(prepare_stage(model, settings()), batch)
    assert got.keys() == {f"model.{name}" for name, _ in model.named_parameters()}
    assert all(torch.isfinite(gradient).all() for gradient in got.values())


def test_mla_learns_too():
    dense = make_mla("v3", vocab_size=97)
    model = family_for(dense.config).from_dense(dense, DsaConfig(TOPK, 8, 1, 16, (0, 1, 2)))
    with accelerated(model):
        batch = batch_of(model, mla_ids(1, LENGTH)[0])
        got = gradients(prepare_stage(model, settings()), batch)
    assert {of_indexer(name) for name in got} == {True, False}
    assert all(torch.isfinite(gradient).all() for gradient in got.values())


def test_distillation_is_zero_where_attention_is_dense():
    """At k >= length the student is its teacher."""
    model = fresh_model()
    batch = batch_of(model, TRAIN[0])
    stage = prepare_stage(model, settings())
    sparse = stage(**batch)
    stage.schedule = TopkSchedule("dense", LENGTH, TOPK, (0, 1, 2), 1)
    dense = stage(**batch)
    assert float(sparse["kl"]) > 1e-3
    assert abs(float(dense["kl"])) < 1e-5


@pytest.mark.parametrize("kind", ["kl", "both"])
def test_gradient_checkpointing_changes_no_loss_and_no_gradient(kind):
    results = []
    for checkpointing in (False, True):
        model = fresh_model()
        batch = batch_of(model, TRAIN[0])
        stage = prepare_stage(model, settings(indexer_loss=kind, checkpointing=checkpointing))
        results.append((gradients(stage, batch), stage.last))
    (plain, seen), (recomputed, seen_too) = results
    assert (seen.lm, seen.kl, seen.indexer) == (seen_too.lm, seen_too.kl, seen_too.indexer)
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(gradient, recomputed[name], rtol=1e-5, atol=1e-7)


def test_packed_documents_are_as_alone():
    """Loss, selection and attention of a window are those of its documents, each weighted by its labels."""
    model = fresh_model()
    window = packed_window(40, 24)
    stage = prepare_stage(model, settings(n_rows=1000)).eval()
    documents = window.input_ids.split((40, 24))
    with torch.no_grad():
        together = stage(**{name: part[None] for name, part in sequence_row(window).items()})
        alone = [stage(**{n: part[None] for n, part in sequence_row(ids).items()}) for ids in documents]
    expected = (39 * alone[0]["lm"] + 23 * alone[1]["lm"]) / 62
    torch.testing.assert_close(together["lm"], expected, rtol=1e-5, atol=1e-5)


def test_labels_end_with_the_document():
    row = sequence_row(packed_window(3, 2))
    labels = next_tokens(row["input_ids"][None], row["position_ids"][None])[0].tolist()
    ids = row["input_ids"].tolist()
    assert labels == [ids[1], ids[2], NO_LABEL, ids[4], NO_LABEL]


def test_documents_shorter_than_k_have_no_indexer_loss():
    model = fresh_model()
    window = packed_window(*[TOPK] * 8)
    stage = prepare_stage(model, settings())
    got = gradients(stage, batch_of(model, window))
    assert stage.last.indexer == 0
    assert all(float(gradient.abs().max()) == 0 for name, gradient in got.items() if of_indexer(name))


def test_the_batch_is_the_mean_of_its_texts():
    model = fresh_model()
    stage = prepare_stage(model, settings(n_rows=1000))
    whole = gradients(stage, batch_of(model, *TRAIN[:2]))
    parts = [gradients(stage, batch_of(model, text)) for text in TRAIN[:2]]
    for name, gradient in whole.items():
        torch.testing.assert_close(gradient, (parts[0][name] + parts[1][name]) / 2, rtol=1e-3, atol=1e-5)


def test_schedules():
    def at(kind, *steps):
        schedule = TopkSchedule(kind, 1024, 64, (0, 1, 2, 3), 40)
        return [[schedule.at(step, layer) for layer in range(4)] for step in steps]

    assert at("none", 0) == [[64] * 4]
    assert at("dense", 39) == [[1024] * 4]
    assert at("shrink", 0, 10, 20, 39) == [[1024] * 4, [256] * 4, [64] * 4, [64] * 4]
    assert at("layers", 0, 10, 20) == [[1024] * 3 + [64], [1024] * 2 + [64] * 2, [64] * 4]


def test_settings_that_cannot_be():
    with pytest.raises(ConfigError, match=r"alpha=1\.5 cannot be"):
        SparseSettings(alpha=1.5)
    with pytest.raises(ConfigError, match="k_schedule='wild' is not known; choose from none, shrink"):
        SparseSettings(k_schedule="wild")
