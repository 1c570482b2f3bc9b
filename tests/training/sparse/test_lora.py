"""LoRA: the trunk's weights are frozen, adapters learn, and the saved model is plain again."""

import copy

import pytest
import torch
from transformers import PreTrainedModel

from fulmen.errors import ConfigError
from fulmen.training.rows import target_row
from fulmen.training.sparse import lora
from fulmen.training.sparse.lora import add_lora, merge_lora
from fulmen.training.sparse.run import prepare_stage, train_sparse
from fulmen.training.sparse.teacher import Teacher
from tests.training.sparse.sparse_setup import HELD_OUT, TRAIN, fresh_model, run, settings

pytest.importorskip("peft")


def test_adapters_and_indexers_learn_and_nothing_else():
    stage = prepare_stage(fresh_model(), settings(lora=4))
    names = [name for name, parameter in stage.named_parameters() if parameter.requires_grad]
    assert all(("lora_" in name) != (".indexer." in name) for name in names)
    for kind in ("q_proj", "o_proj", "down_proj"):
        assert any(f"{kind}.lora_A" in name for name in names)
    assert set(stage.trained_state()) == set(names)


def test_a_run_merges_into_a_plain_model(tmp_path):
    before = fresh_model()
    model, result = run(tmp_path, lora=4, steps=20, learning_rate=1e-2)
    assert result.best_step > 0
    assert result.loss_after < result.loss_before
    assert not list((tmp_path / "checkpoint-20").glob("adapter*"))
    ours, theirs = model.state_dict(), before.state_dict()
    assert ours.keys() == theirs.keys()
    assert torch.equal(ours["model.embed_tokens.weight"], theirs["model.embed_tokens.weight"])
    assert not torch.equal(
        ours["model.layers.0.self_attn.q_proj.weight"], theirs["model.layers.0.self_attn.q_proj.weight"]
    )
    model.save_pretrained(tmp_path / "saved")
    again = type(model).from_pretrained(tmp_path / "saved").state_dict()
    assert all(torch.equal(again[name], ours[name]) for name in ours)


def test_merging_keeps_the_function():
    model = fresh_model()
    add_lora(model, 4, seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
        expected = model(TRAIN[0][None]).logits
        merge_lora(model)
        torch.testing.assert_close(model(TRAIN[0][None]).logits, expected, rtol=1e-4, atol=1e-4)


def test_the_teacher_is_the_model_without_adapters_and_no_copy(tmp_path):
    """Whatever the adapters have learned meanwhile; they go on learning afterwards."""
    model = fresh_model()
    row = target_row(TRAIN[0])
    expected = Teacher(model, 8).targets(row)
    stage = prepare_stage(model, settings(lora=4))
    names = set(stage.trained_state())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    for part, own in zip(Teacher(model, 8).targets(row), expected, strict=True):
        torch.testing.assert_close(part, own)
    assert set(stage.trained_state()) == names
    with torch.no_grad():
        changed = model(TRAIN[0][None]).logits
    merge_lora(model)
    torch.testing.assert_close(model(TRAIN[0][None]).logits, changed, rtol=1e-4, atol=1e-4)


def test_a_live_teacher_takes_no_second_model(tmp_path, monkeypatch):
    """And teaches what a model beside it teaches."""
    live = settings(lora=4, steps=6, teacher_place="live")
    beside = train_sparse(fresh_model(), TRAIN, HELD_OUT, tmp_path / "beside", live, fresh_model())
    copied, whole_copy = [], copy.deepcopy

    def counted(what, memo=None):
        copied.append(what)
        return whole_copy(what, memo)

    monkeypatch.setattr(copy, "deepcopy", counted)
    own = train_sparse(fresh_model(), TRAIN, HELD_OUT, tmp_path / "own", live)
    assert not any(isinstance(what, PreTrainedModel) for what in copied)
    assert own.loss_after == pytest.approx(beside.loss_after, abs=1e-6)


def test_without_peft_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(lora.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"install fulmen\[lora\]"):
        add_lora(fresh_model(), 4, seed=0)
