"""Experts that sampling chose, chosen again in training."""

from contextlib import contextmanager

import pytest
import torch

from fulmen.errors import UnsupportedModelError
from fulmen.modeling.rollouts import Sampling
from fulmen.training.rl.routing import routing_of
from fulmen.training.rl.scoring import Replies, score_replies
from tests.modeling.gqa.tiny_gqa import make_dense, random_ids
from tests.training.rl.tiny_rl import fresh_model, generate_engine, run

PROMPTS = [random_ids(1, 11)[0].tolist(), random_ids(1, 14, seed=1)[0].tolist()]


@contextmanager
def visited(model):
    """Which experts each layer's tokens visit: [N, K] for every call."""
    found, hooks = [], []
    for module in model.modules():
        if type(module).__name__.endswith("Experts"):
            hooks.append(module.register_forward_pre_hook(lambda _, args: found.append(args[1].clone())))
    yield found
    for hook in hooks:
        hook.remove()


def rollouts(model):
    found = generate_engine(model).generate(PROMPTS, Sampling(2, 5, top_k=8))
    assert len(found) == 4
    return found


def scored(model, rollout, replays=True):
    ids = torch.tensor([[*PROMPTS[rollout.prompt], *rollout.tokens]])
    experts_BSLK = torch.tensor([rollout.experts])
    experts_BSLK = torch.cat([experts_BSLK, torch.full_like(experts_BSLK[:, :1], -1)], 1)
    tokens_BT = torch.tensor([rollout.tokens])
    start_B = torch.tensor([len(PROMPTS[rollout.prompt])])
    counts_BT = torch.ones_like(tokens_BT, dtype=torch.bool)
    return score_replies(
        model, Replies(ids, start_B, tokens_BT, counts_BT, None, experts_BSLK if replays else None), 1.0
    )


@pytest.mark.parametrize("name", ["qwen3-moe", "qwen2-moe", "granite-moe", "gpt-oss"])
def test_what_is_noted_is_what_a_forward_pass_chooses(name):
    model = fresh_model(name).eval()
    for rollout in rollouts(model):
        ids = torch.tensor([[*PROMPTS[rollout.prompt], *rollout.tokens]])
        with torch.no_grad(), visited(model) as chosen:
            model(ids[:, :-1])
        assert torch.stack(chosen, 1).tolist() == rollout.experts


def test_after_an_update_experts_differ_without_and_none_with_replay():
    model = fresh_model("qwen3-moe").eval()
    found = rollouts(model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".gate." in name:
                p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    differing = {}
    for replays in (False, True):
        differing[replays] = 0
        for rollout in found:
            with visited(model) as chosen:
                scored(model, rollout, replays)
            told_SLK = torch.tensor(rollout.experts)
            chosen_SLK = torch.stack(chosen, 1)[:-1]
            differing[replays] += int((chosen_SLK.sort(-1).values != told_SLK.sort(-1).values).any(-1).sum())
    assert differing[False] > 0
    assert differing[True] == 0


def test_gradients_reach_the_router_and_padding_chooses_by_itself():
    model = fresh_model("qwen3-moe").train()
    rollout = rollouts(model)[0]
    scored(model, rollout).logp_BT.sum().backward()
    gates = [p.grad for name, p in model.named_parameters() if ".gate." in name]
    assert all(grad is not None and grad.abs().sum() > 0 for grad in gates)
    assert routing_of(model).take_replaced() == 0.0


def test_models_without_experts_and_with_others():
    assert routing_of(make_dense("llama")) is None
    with pytest.raises(UnsupportedModelError, match=r"glm4_moe.*not chosen by one topk"):
        routing_of(make_dense("glm4-moe"))


def test_a_run_says_how_many_choices_were_replaced(tmp_path):
    _, result = run(tmp_path / "run", fresh_model("qwen3-moe"), updates=2, steps=2)
    assert result.rows[0]["replaced_experts"] == 0.0
    assert 0.0 <= result.rows[1]["replaced_experts"] < 1.0
