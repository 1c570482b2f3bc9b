"""The formulas, against numbers by hand and against a policy whose KL is known."""

import math

import pytest
import torch

from fulmen.training.rl.objective import (
    clipped_surrogate,
    group_advantages,
    grpo_loss,
    off_policy_keeps,
    token_mean,
    unbiased_kl,
)

NAN = math.nan


def test_advantages_are_over_the_groups_mean_and_not_divided_by_the_deviation():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], [1.0, NAN, 0.5, 0.0], [NAN] * 4])
    expected = torch.tensor([[0.75, -0.25, -0.25, -0.25], [0.0] * 4, [0.5, 0.0, 0.0, -0.5], [0.0] * 4])
    assert torch.equal(group_advantages(rewards), expected)


def test_the_surrogate_is_clipped_where_it_would_gain():
    ratio = torch.tensor([[0.5, 1.0, 2.0], [0.5, 1.0, 2.0]])
    found = clipped_surrogate(ratio, torch.tensor([1.0, -1.0]), 0.2, 0.3)
    assert torch.allclose(found, torch.tensor([[0.5, 1.0, 1.3], [-0.8, -1.0, -2.0]]))


def test_a_bad_reply_that_the_policy_has_left_is_masked_and_a_good_one_is_not():
    engine = torch.tensor([[-1.0, -1.0, 0.0]] * 4)
    counts = torch.tensor([[True, True, False]] * 4)
    logp = engine - torch.tensor([0.3, 0.3, 0.1, -0.3])[:, None]
    advantage = torch.tensor([-1.0, 1.0, -1.0, -1.0])
    assert off_policy_keeps(advantage, logp, engine, counts, 0.2).tolist() == [False, True, True, True]


def test_the_loss_is_the_mean_over_replies_of_the_mean_over_tokens():
    counts = torch.tensor([[True, False, False, False], [True, True, True, True]])
    logp = torch.full((2, 4), -1.0, requires_grad=True)
    still = logp.detach()
    found = grpo_loss(logp, still, still, torch.tensor([1.0, -0.5]), counts, torch.zeros(2), (0.2, 0.2), 1.0)
    assert found.loss.item() == pytest.approx(-(1.0 - 0.5) / 2)
    found.loss.backward()
    # Each reply's tokens share half of the gradient, however many they are; padding has none.
    assert torch.allclose(logp.grad, torch.tensor([[-0.5, 0, 0, 0], [0.0625] * 4]))


def test_a_masked_reply_keeps_its_kl():
    counts, strength = torch.ones(1, 2, dtype=torch.bool), torch.tensor([0.5])
    logp, engine = torch.full((1, 2), -2.0), torch.full((1, 2), -1.0)
    reference = torch.full((1, 2), -2.5)
    found = grpo_loss(logp, engine, reference, torch.tensor([-1.0]), counts, strength, (0.2, 0.2), 0.1)
    assert found.keeps_B.tolist() == [False]
    kl = math.exp(-1.0) * (math.exp(-0.5) + 0.5 - 1)
    assert float(found.loss) == pytest.approx(0.5 * kl)


def test_padding_of_any_size_has_no_part():
    counts = torch.tensor([[True, False]])
    huge = torch.tensor([[-1.0, 1e4]])
    logp = huge.clone().requires_grad_()
    zero = torch.zeros(1, 2)
    found = grpo_loss(logp, zero, zero, torch.ones(1), counts, torch.ones(1), (0.2, 0.2), 0.1)
    found.loss.backward()
    assert torch.isfinite(found.loss)
    assert logp.grad[0, 1] == 0
    assert float(token_mean(huge, torch.tensor([[False, False]]))) == 0


def kl_gradients(n: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Mean and standard error of estimates of d KL(policy || reference) / d logits.

    Samples are of another policy: one of a step ago, as with several updates on one call of the engine.
    """
    torch.manual_seed(0)
    logits = torch.tensor([0.5, -0.2, 0.1, -0.4], dtype=torch.float64)
    engine = (logits + torch.tensor([0.5, -0.4, -0.3, 0.2])).log_softmax(0)
    reference = torch.tensor([-0.3, 0.6, 0.0, 0.2], dtype=torch.float64).log_softmax(0)
    tokens = torch.multinomial(engine.exp(), n, replacement=True)
    found = {}
    for name in ("ours", "trl", "trl without correction"):
        # Of each token by itself: a sample's gradient depends on its token alone.
        grads = []
        for token in range(4):
            leaf = logits.clone().requires_grad_()
            logp = leaf.log_softmax(0)[token].reshape(1, 1)
            of_engine = engine[token].reshape(1, 1)
            old = of_engine if name == "ours" else logp.detach()
            kl = unbiased_kl(logp, reference[token].reshape(1, 1), old)
            if name == "trl without correction":
                log_u = reference[token] - logp
                kl = log_u.exp() - log_u - 1
            grads.append(torch.autograd.grad(kl.sum(), leaf)[0])
        samples = torch.stack(grads)[tokens]
        found[name] = (samples.mean(0), samples.std(0) / math.sqrt(n))
    leaf = logits.clone().requires_grad_()
    logp = leaf.log_softmax(0)
    exact = torch.autograd.grad((logp.exp() * (logp - reference)).sum(), leaf)[0]
    found["exact"] = (exact, torch.zeros(4))
    return found


def test_the_kls_gradient_is_unbiased_and_trls_is_not():
    """TRL's KL corrects by a policy that it recomputes, not by the one that sampled."""
    found = kl_gradients(200_000)
    exact = found["exact"][0]
    off = {
        name: float(((mean - exact).abs() / error).max())
        for name, (mean, error) in found.items()
        if name != "exact"
    }
    print({name: round(value, 2) for name, value in off.items()}, "standard errors from the exact gradient")
    assert off["ours"] < 2
    assert off["trl"] > 10
    assert off["trl without correction"] > 10
