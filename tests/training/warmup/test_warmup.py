"""The warm-up: its loss falls, the trunk stays, the best step is kept, an interruption changes nothing."""

import json
from pathlib import Path

import pytest
import torch

from fulmen.data import TokenSequence
from fulmen.errors import TrainingDivergedError
from fulmen.modeling.gqa.inherit import inherit_gqa
from fulmen.training.warmup.losses import with_gradient_in_hand
from fulmen.training.warmup.run import warm_up
from fulmen.training.warmup.settings import WarmupSettings
from fulmen.training.warmup.stage import IndexerStack
from fulmen.training.warmup.trainer import sparse_loss
from tests.modeling.gqa.tiny_gqa import make_dense, make_dsa, random_ids
from tests.training.forks import die, run_killed


def sampled_texts() -> list[torch.Tensor]:
    """Texts that the dense model wrote: it is the best model of these, so a worse selection costs loss."""
    torch.manual_seed(0)
    start = random_ids(10, 1)
    return list(make_dense().generate(start, do_sample=True, top_k=0, max_new_tokens=95, min_new_tokens=95))


TEXTS = sampled_texts()
TRAIN, VALIDATION = TEXTS[:8], TEXTS[8:]
SETTINGS = WarmupSettings(steps=12, budget_s=None, learning_rate=3e-3, n_rows=32, patience=9)


def train(run_dir: Path, settings: WarmupSettings = SETTINGS, model=None):
    model = make_dsa(make_dense(), topk=8) if model is None else model
    return model, warm_up(model, TRAIN, VALIDATION, run_dir, settings)


def indexers(model) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if ".indexer." in name}


def log_rows(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "layers.jsonl").read_text().splitlines()]


def mean_loss(model, texts) -> float:
    """The training loss over all query rows of the texts."""
    with torch.no_grad():
        return sum(float(IndexerStack(model, 96)(ids[None])["loss"]) for ids in texts) / len(texts)


def test_loss_falls_and_only_the_indexers_change(tmp_path):
    before = {name: tensor.clone() for name, tensor in make_dense().state_dict().items()}
    model_before = make_dsa(make_dense(), topk=8)
    model, result = train(tmp_path)
    first, last = (mean_loss(model_before, TRAIN), mean_loss(model, TRAIN))
    assert last < 0.97 * first
    assert {row["step"] for row in log_rows(tmp_path)} == set(range(1, 13))
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert result.last_step == 12


def test_log_has_every_layer_at_every_step(tmp_path):
    train(tmp_path)
    rows = log_rows(tmp_path)
    assert [(row["step"], row["layer"]) for row in rows] == [(s, i) for s in range(1, 13) for i in range(3)]
    assert all(0 < row["captured"] <= row["oracle"] + 1e-6 <= 1 + 2e-6 for row in rows)
    assert all(row["entropy"] > 0 for row in rows)


def test_result_is_the_loss_of_the_weights_that_are_left(tmp_path):
    model, result = train(tmp_path)
    assert result.loss_after <= result.loss_before
    assert sparse_loss(model, VALIDATION) == pytest.approx(result.loss_after, abs=1e-6)


def test_never_ends_worse_than_it_began(tmp_path):
    """A learning rate that destroys the indexers: the first weights come back, bit for bit."""
    model = make_dsa(make_dense(), topk=8)
    inherit_gqa(model, torch.stack(TRAIN), 8)
    before = {name: tensor.clone() for name, tensor in indexers(model).items()}
    wild = WarmupSettings(steps=8, budget_s=None, learning_rate=30.0, n_rows=32, patience=1)
    _, result = train(tmp_path / "wild", wild, model)
    assert result.loss_after == result.loss_before
    assert result.best_step == 0
    assert all(torch.equal(before[name], tensor) for name, tensor in indexers(model).items())


def test_stops_early(tmp_path):
    idle = WarmupSettings(steps=40, budget_s=None, learning_rate=1e-30, n_rows=32, patience=1)
    _, result = train(tmp_path, idle)
    assert result.last_step < 40


def test_budget_ends_it(tmp_path):
    _, result = train(tmp_path, WarmupSettings(steps=10**6, budget_s=0.5, learning_rate=1e-3, n_rows=32))
    assert 0 < result.last_step < 10**6


def test_nan_stops_it_and_names_the_layer(tmp_path):
    model = make_dsa(make_dense(), topk=8)
    before = {name: tensor.clone() for name, tensor in indexers(model).items()}
    bad = list(TRAIN)
    model.model.layers[1].self_attn.k_proj.register_forward_hook(
        lambda _, __, out: out * torch.nan if model.training or torch.is_grad_enabled() else out
    )
    with pytest.raises(TrainingDivergedError, match=r"layers \[1"):
        warm_up(model, bad, VALIDATION, tmp_path, SETTINGS)
    assert all(torch.equal(before[name], tensor) for name, tensor in indexers(model).items())


# Beside the plain one, capped logits and sinks: of the target, and not trained.
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt-oss"])
def test_gradient_reaches_the_indexers_alone(name):
    model = make_dsa(make_dense(name), topk=8)
    IndexerStack(model, 16)(TRAIN[0][None])["loss"].backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all((grad is not None) == (".indexer." in name) for name, grad in grads.items())


def test_gradient_taken_early_is_the_gradient():
    weight, x = torch.randn(3, dtype=torch.float64, requires_grad=True), torch.arange(3.0)
    inputs = (weight.exp(), None, x)  # like an indexer without a shift, and one input that is not trained
    leaves = [None if y is None else y.detach().requires_grad_(y.requires_grad) for y in inputs]

    def loss_of(y, _, z):
        return (y**2 * z).sum() + y.prod()

    (plain,) = torch.autograd.grad(3 * loss_of(*inputs), weight, retain_graph=True)
    (3 * with_gradient_in_hand(loss_of(*leaves), leaves, inputs)).backward()
    torch.testing.assert_close(weight.grad, plain)
    with torch.no_grad():
        assert not with_gradient_in_hand(loss_of(*inputs), inputs, inputs).requires_grad


def test_bf16_indexers_take_updates_that_bf16_would_round_away(tmp_path):
    """As in the sparse stage; the first step, too, changes the float32 copies."""
    model = make_dsa(make_dense(), topk=8).bfloat16()
    before, seen = {name: tensor.clone() for name, tensor in indexers(model).items()}, {}

    def on_step(step, *_):
        seen[step] = {name: tensor.clone() for name, tensor in indexers(model).items()}

    rate = 0.125 * 2**-8 / 3
    small = WarmupSettings(steps=16, budget_s=None, learning_rate=rate, n_rows=32, patience=9)
    warm_up(model, TRAIN, VALIDATION, tmp_path, small, on_step)
    large = {name: tensor.abs() > 0.125 for name, tensor in before.items() if tensor.is_floating_point()}
    assert all(torch.equal((before[name] + rate)[large[name]], before[name][large[name]]) for name in large)
    moved = [(seen[1][name] != before[name].float())[large[name]] for name in large]
    assert torch.cat(moved).float().mean() > 0.9
    changed = [(seen[16][name].bfloat16() != before[name])[large[name]] for name in large]
    assert torch.cat(changed).float().mean() > 0.05
    assert {indexers(model)[name].dtype for name in large} == {torch.bfloat16}


def run_until(folder: str, when: int) -> None:
    def on_step(step, steps, logs):
        if step == when and "kl" in logs:
            die()

    warm_up(make_dsa(make_dense(), topk=8), TRAIN, VALIDATION, Path(folder), SETTINGS, on_step)


def test_killed_and_resumed_equals_uninterrupted(tmp_path):
    whole, whole_result = train(tmp_path / "whole")
    run_killed(run_until, [(str(tmp_path / "killed"), 8)])
    resumed, resumed_result = train(tmp_path / "killed")
    assert resumed_result.best_step == whole_result.best_step
    assert resumed_result.loss_after == whole_result.loss_after
    for name, tensor in indexers(whole).items():
        assert torch.equal(tensor, indexers(resumed)[name]), name


def test_packed_documents_are_not_mixed():
    """A window of two documents has the sparse loss of the two, each token weighing the same."""
    model = make_dsa(make_dense(), topk=8)
    ids = torch.cat((TRAIN[0][:32], TRAIN[1]))
    window = TokenSequence(("a", "b"), "prose", ids[:64], (0, 32))
    assert window.position_ids.tolist() == [*range(32), *range(32)]
    assert sparse_loss(model, [window]) == pytest.approx(sparse_losses_of_all(model, TRAIN[1][:32]), abs=1e-5)
    rows = {"input_ids": window.input_ids[None], "position_ids": window.position_ids[None]}
    stack = IndexerStack(model, 1000)
    with torch.no_grad():
        parts = [float(stack(ids[None])["loss"]) for ids in window.input_ids.split(32)]
        assert float(stack(**rows)["loss"]) == pytest.approx(
            sum(parts) / 2, rel=1e-2
        )  # one temperature for both


@torch.no_grad()
def sparse_losses_of_all(model, ids_T) -> float:
    return float(torch.nn.functional.cross_entropy(model(ids_T[None]).logits[0, :-1], ids_T[1:]))
