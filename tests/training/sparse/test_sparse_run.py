"""Runs of the sparse stage: the loss falls, the best is kept, no interruption changes anything."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer

from fulmen.errors import ConfigError, OutputError, TrainingDivergedError
from fulmen.training.checkpoints import last_complete_checkpoint
from fulmen.training.rows import target_rows
from fulmen.training.sparse import trainer
from fulmen.training.sparse.run import prepare_stage, train_sparse
from fulmen.training.sparse.trainer import held_out_loss
from tests.training.forks import die, run_killed
from tests.training.sparse.sparse_setup import (
    HELD_OUT,
    LENGTH,
    TOPK,
    TRAIN,
    fresh_model,
    log_rows,
    run,
    settings,
)


def states_equal(one, other) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_distillation_wins_the_dense_loss_back(tmp_path):
    """On the texts it is taught by; on three others, what six texts teach hangs on the last bits of sums."""
    model, result = run(tmp_path, steps=60, learning_rate=1e-3, held_out=TRAIN)
    assert result.dense_before < result.loss_before
    assert result.loss_after < result.loss_before - 0.3 * (result.loss_before - result.dense_before)
    assert result.best_step > 0
    stage = prepare_stage(model, settings())
    assert held_out_loss(stage, target_rows(TRAIN), "cpu").total == pytest.approx(result.loss_after, abs=1e-6)
    rows = log_rows(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, 61))
    assert [row["tokens"] for row in rows] == [LENGTH * step for step in range(1, 61)]
    assert set(rows[0]["captured"]) == {"0", "1", "2"}
    assert rows[-1]["kl"] < rows[0]["kl"]
    assert all(0 < mass <= 1 + 1e-6 for row in rows for mass in row["captured"].values())


def test_never_ends_worse_than_it_began(tmp_path):
    before = fresh_model()
    model, result = run(tmp_path, learning_rate=1e-7, indexer_learning_rate=10.0)
    if result.best_step == 0:
        assert states_equal(model, before)
    assert result.loss_after <= result.loss_before


def test_disk_and_live_teacher_give_the_same_bits(tmp_path):
    models = [run(tmp_path / place, teacher_place=place, steps=4)[0] for place in ("disk", "live")]
    assert len(list((tmp_path / "disk" / "teacher").iterdir())) == len(TRAIN)
    assert not (tmp_path / "live" / "teacher").exists()
    assert states_equal(*models)


def test_another_model_can_teach(tmp_path):
    teacher = fresh_model("llama3-rope")
    result = train_sparse(fresh_model(), TRAIN, HELD_OUT, tmp_path, settings(), teacher)
    assert result.last_step == 6
    assert log_rows(tmp_path)[0]["kl"] > 1


def test_the_dense_control_leaves_the_indexers(tmp_path):
    before = fresh_model()
    model, _ = run(tmp_path, k_schedule="dense", alpha=0.0)
    same = {
        name: torch.equal(tensor, before.state_dict()[name]) for name, tensor in model.state_dict().items()
    }
    assert all(same[name] for name in same if ".indexer." in name)
    assert "captured" not in log_rows(tmp_path)[0]


@pytest.mark.parametrize("kind", ["shrink", "layers"])
def test_schedules_reach_the_target(tmp_path, kind):
    run(tmp_path, k_schedule=kind)
    kept = [row["topk"] for row in log_rows(tmp_path)]
    assert kept[0]["0"] == LENGTH
    assert set(kept[-1].values()) == {TOPK}


def test_bf16_accumulation_and_checkpointing_run(tmp_path):
    _, result = run(tmp_path, bf16=True, accumulate=2, checkpointing=True, steps=3)
    assert result.tokens == 3 * 2 * LENGTH
    assert len(log_rows(tmp_path)) == 3


def test_the_first_step_changes_the_weights(tmp_path):
    model, before, after = fresh_model(), {}, {}
    before.update({name: weight.clone() for name, weight in model.state_dict().items()})

    def on_step(step, *_):
        if step == 1 and not after:
            after.update({name: weight.clone() for name, weight in model.state_dict().items()})

    run(tmp_path, model, steps=20, evaluations=10, learning_rate=1e-6, on_step=on_step)
    # A warm-up of five steps: a fifth of the rate.
    assert log_rows(tmp_path)[0]["lr"] == pytest.approx(2e-7)
    for name in ("model.embed_tokens.weight", "model.layers.0.self_attn.indexer.wk.weight"):
        assert not torch.equal(before[name], after[name])


def test_bf16_weights_take_updates_that_bf16_would_round_away(tmp_path):
    """Adam moves a weight by its rate a step: here at most a third of half the spacing of bfloat16."""
    model = fresh_model().bfloat16()
    large = {name: weight.abs() > 0.125 for name, weight in model.named_parameters()}
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    rate = 0.125 * 2**-8 / 3
    assert all(
        torch.equal((weight + rate)[large[name]], weight[large[name]]) for name, weight in before.items()
    )
    _, result = run(tmp_path, model, steps=20, learning_rate=rate, indexer_learning_rate=rate)
    assert result.best_step > 0
    changed = {name: (weight != before[name])[large[name]] for name, weight in model.named_parameters()}
    for part in (".indexer.", "mlp", "embed"):
        assert torch.cat([some for name, some in changed.items() if part in name]).float().mean() > 0.05
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    saved = load_file(tmp_path / f"checkpoint-{result.best_step}" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert result.loss_after < result.loss_before


@pytest.mark.parametrize("name", ["llama", "qwen2-mixed", "gemma3", "granite-moe", "gpt-oss"])
def test_adapters_beside_bf16_weights(tmp_path, name):
    """The model is its own teacher while its adapters and indexers are in float32."""
    model = fresh_model(name).bfloat16()
    before = {place: weight.detach().clone() for place, weight in model.named_parameters()}
    _, result = run(tmp_path, model, steps=3, lora=2, learning_rate=1e-2)
    assert result.last_step == 3
    assert math.isfinite(result.loss_after)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert len(log_rows(tmp_path)) == 3
    has_changed = any(not torch.equal(weight, before[place]) for place, weight in model.named_parameters())
    assert has_changed == bool(result.best_step)


def test_budget_ends_it(tmp_path):
    _, result = run(tmp_path, steps=None, budget_s=0.5, evaluations=1)
    assert result.last_step > 0


def test_texts_must_be_longer_than_k(tmp_path):
    with pytest.raises(ConfigError, match="topk=8 is not below the sequences' 8 tokens"):
        run(tmp_path, train=[text[:TOPK] for text in TRAIN])


KILLED = [(1, "step"), (4, "save"), (5, "step")]


def run_until(folder: str, when: int, place: str) -> None:
    """The run of `whole_run`, which dies in a step or while its checkpoint is being written."""
    if place == "save":
        save = Trainer._save_rng_state

        def save_or_die(self, folder):
            return die() if self.state.global_step == when else save(self, folder)

        Trainer._save_rng_state = save_or_die

    def on_step(step, steps, logs):
        if place == "step" and step == when and "kl" in logs:
            die()

    run(Path(folder), on_step=on_step, steps=6, save_every=2, accumulate=2)


@pytest.fixture(scope="module")
def killed_runs(tmp_path_factory):
    """Folder by case."""
    folders = {case: tmp_path_factory.mktemp("killed") for case in KILLED}
    run_killed(run_until, [(str(folder), *case) for case, folder in folders.items()])
    return folders


@pytest.mark.parametrize("case", KILLED, ids=lambda case: f"{case[0]}-{case[1]}")
def test_killed_and_resumed_equals_uninterrupted(killed_runs, whole_run, case):
    whole, rows, result = whole_run
    folder = killed_runs[case]
    assert len(log_rows(folder)) <= case[0]
    resumed, again = run(folder, steps=6, save_every=2, accumulate=2)
    assert log_rows(folder) == rows
    assert states_equal(whole, resumed)
    assert (again.loss_after, again.best_step) == (result.loss_after, result.best_step)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    model, result = run(folder, steps=6, save_every=2, accumulate=2)
    return model, log_rows(folder), result


def spoil(model, at_step: int, factor: float) -> None:
    """Multiply a layer's output by `factor` in one training step."""
    calls = []

    def hook(module, args, out):
        calls.extend([1] * torch.is_grad_enabled())
        return out * factor if torch.is_grad_enabled() and len(calls) == at_step else out

    model.model.layers[1].mlp.register_forward_hook(hook)


def test_nan_stops_before_the_weights_change(tmp_path):
    model = fresh_model()
    spoil(model, 5, torch.nan)
    with pytest.raises(TrainingDivergedError, match=r"is not finite at step 5.*last good checkpoint is kept"):
        run(tmp_path, model, save_every=2)
    assert last_complete_checkpoint(tmp_path).endswith("checkpoint-4")
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())


def test_a_spike_stops_it(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "SPIKE_FACTOR", 1.2)
    monkeypatch.setattr(trainer, "SPIKE_KL", 0.3)
    model = fresh_model()
    spoil(model, 8, 40.0)
    with pytest.raises(TrainingDivergedError, match=r"at step 8 is a spike \(median of the steps before"):
        run(tmp_path, model, steps=20)


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    save = torch.save

    def full(thing, file, *args, **kwargs):
        if "checkpoint-6" in str(file):
            Path(file).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(thing, file, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OutputError, match=r"checkpoint-6 cannot be written .*No space left"):
        run(tmp_path, evaluations=3)
    monkeypatch.undo()
    last = Path(last_complete_checkpoint(tmp_path))
    assert last.name == "checkpoint-4"
    assert load_file(last / "model.safetensors")
    _, result = run(tmp_path, evaluations=3)
    assert result.last_step == 6


def test_a_budget_with_a_live_teacher(tmp_path):
    """One step is timed before the teacher is copied from the model; nothing of it stays behind."""
    _, result = run(tmp_path, steps=None, budget_s=0.5, teacher_place="live")
    assert result.last_step > 0
