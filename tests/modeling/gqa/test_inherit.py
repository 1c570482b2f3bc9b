"""The closed-form indexer: it finds what the model's own heads find, far better than a random one."""

import math

import pytest
import torch
from torch import Tensor

from fulmen.modeling.gqa.inherit import inherit_gqa, ridge
from fulmen.modeling.gqa.own_logits import mean_attention_of, own_logits, uncapped
from fulmen.modeling.gqa.rotary_pairs import pair_covariance, pair_order, pair_products, pick_pairs
from fulmen.modeling.selectors import DenseSelector, IndexerSelector, Selector, use_selector
from fulmen.ops.attention.mean import mean_attention
from fulmen.ops.common.precision import cap_logits
from fulmen.ops.common.rope import apply_rope
from fulmen.ops.topk import select_topk
from tests.modeling.gqa.tiny_gqa import FAMILIES, make_dense, make_dsa, random_ids

LENGTH, TOPK = 160, 20


class CapturedMass(Selector):
    """Attends densely and notes how much attention the indexer's and the best keys hold."""

    def __init__(self) -> None:
        self.captured: list[float] = []
        self.best: list[float] = []

    def select(self, inputs, topk: int) -> None:
        mass_BTS = true_attention(inputs)
        intervals = (inputs.start_BT, inputs.stop_BT)
        own, best = IndexerSelector().select(inputs, topk), select_topk(mass_BTS, *intervals, topk)
        self.captured.append(held(mass_BTS, own))
        self.best.append(held(mass_BTS, best))


def true_attention(inputs) -> Tensor:
    shared = inputs.q_BTHD.shape[2] // inputs.k_BSGD.shape[2]
    k_BSHD = inputs.k_BSGD.repeat_interleave(shared, 2)
    logits = torch.einsum("bthd,bshd->bhts", inputs.q_BTHD, k_BSHD) * inputs.scale
    if inputs.softcap is not None:
        logits = torch.tanh(logits / inputs.softcap) * inputs.softcap
    hidden = torch.arange(logits.shape[-1]) >= inputs.stop_BT[..., None]
    powers = logits.exp().masked_fill(hidden[:, None], 0)
    total = powers.sum(-1, keepdim=True)
    if inputs.sinks_H is not None:
        total += inputs.sinks_H.exp()[:, None, None]
    mean = (powers / total).mean(1)
    return mean / mean.sum(-1, keepdim=True)


def held(mass_BTS: Tensor, topk_BTK: Tensor) -> float:
    mass = mass_BTS.gather(-1, topk_BTK.clamp_min(0).long()).masked_fill(topk_BTK < 0, 0).sum(-1)
    return float(mass[:, 2 * TOPK :].mean())


def measured(model) -> tuple[float, float]:
    seen = CapturedMass()
    with torch.no_grad(), use_selector(model, seen):
        model.base_model(random_ids(2, LENGTH, seed=9), use_cache=False)
    return sum(seen.captured) / len(seen.captured), sum(seen.best) / len(seen.best)


@pytest.mark.parametrize("name", FAMILIES)
def test_inherited_beats_random_and_nears_the_oracle(name):
    dense = make_dense(name)
    model = make_dsa(dense, topk=TOPK, head_dim=12)
    random, best = measured(model)
    report = inherit_gqa(model, random_ids(8, LENGTH, seed=3), TOPK)
    inherited, _ = measured(model)
    assert inherited > random + 0.5 * (best - random)
    assert [layer.layer for layer in report] == list(model.config.dsa["layers"])
    assert all(0 < layer.key_fit <= 1 and layer.kl > 0 for layer in report)


def test_with_every_pair_the_keys_explain_everything_and_the_set_is_nearly_the_best():
    model = make_dsa(make_dense("qwen3"), topk=TOPK, head_dim=24)
    report = inherit_gqa(model, random_ids(8, LENGTH, seed=3), TOPK)
    captured, best = measured(model)
    assert all(layer.key_fit == pytest.approx(1, abs=1e-3) for layer in report)
    assert captured > 0.97 * best


@pytest.mark.parametrize("heads", [2, 4])
def test_fewer_index_heads_pool_the_attention_heads(heads):
    # Made for no longer texts than it is measured on.
    model = make_dsa(make_dense(max_position_embeddings=LENGTH), topk=TOPK, heads=heads, head_dim=12)
    random, best = measured(model)
    inherit_gqa(model, random_ids(8, LENGTH, seed=3), TOPK)
    assert measured(model)[0] > random + 0.35 * (best - random)


def test_nothing_but_the_indexers_changes_and_twice_gives_the_same():
    dense = make_dense()
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    states = []
    for _ in range(2):
        model = make_dsa(dense, topk=TOPK, head_dim=12)
        inherit_gqa(model, random_ids(4, LENGTH), TOPK)
        states.append(model.state_dict())
    assert all(torch.equal(before[name], states[0][name]) for name in before)
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    with torch.no_grad(), use_selector(model, DenseSelector()):
        ids = random_ids(1, 50)
        torch.testing.assert_close(model(ids).logits, dense(ids).logits, atol=1e-4, rtol=1e-4)


def test_bfloat16_model():
    model = make_dsa(make_dense(dtype=torch.bfloat16), topk=TOPK, head_dim=12)
    random, best = measured(model)
    inherit_gqa(model, random_ids(8, LENGTH, seed=3), TOPK)
    assert measured(model)[0] > random + 0.5 * (best - random)


def test_pair_contributions_add_up_to_the_logit_and_turn_with_rope():
    q, k = torch.randn(3, 8), torch.randn(5, 8)
    parts = pair_products(q[:, None], k[None]).mT
    torch.testing.assert_close(parts[:, :4].sum(1), q @ k.T)
    product = torch.complex(*q.chunk(2, -1))[:, :, None] * torch.complex(*k.chunk(2, -1)).conj().T
    torch.testing.assert_close(parts, torch.cat((product.real, product.imag), 1))


def test_pair_covariance_is_that_of_every_query_and_key_by_itself():
    generator = torch.Generator().manual_seed(2)
    rows, n_keys, dim = torch.tensor([3, 200, 513, 1299]), 1300, 6
    q, k = (torch.randn(n, heads, dim, generator=generator) for n, heads in ((4, 4), (n_keys, 2)))
    weight = torch.rand(4, 4, n_keys, generator=generator) * (torch.arange(n_keys) <= rows[:, None])
    weight /= weight.sum(-1, keepdim=True)
    found = pair_covariance(q, k.transpose(0, 1), weight, rows)
    for head in range(4):
        parts = pair_products(q[:, head, None], k[None, :, head // 2]).double()
        centred = parts - (weight[head, :, :, None] * parts).sum(1, keepdim=True)
        expected = torch.einsum("rs,rsf,rsg->fg", weight[head].double(), centred, centred)
        torch.testing.assert_close(found[head], expected, atol=1e-5, rtol=1e-5)


def test_own_logits_see_nothing_later_however_far_apart_they_are():
    generator = torch.Generator().manual_seed(3)
    rows = torch.tensor([0, 1, 5, 5, 9])
    q, k = (30 * torch.randn(12, heads, 8, generator=generator) for heads in (4, 2))
    logits = own_logits(q, k, rows, 0.5)
    later = torch.arange(10) > rows[:, None]
    expected = 0.5 * torch.einsum("rhd,shd->hrs", q[rows], k[:10].repeat_interleave(2, 1))
    torch.testing.assert_close(logits, expected.masked_fill(later, -torch.inf), rtol=1e-5, atol=1e-3)
    mean, norm = mean_attention_of(logits.clone())
    torch.testing.assert_close(mean, logits.softmax(-1).mean(0), atol=1e-7, rtol=1e-5)
    torch.testing.assert_close(norm, logits.logsumexp(-1))


@pytest.mark.parametrize("softcap", [None, 4.0])
def test_own_logits_with_a_cap_and_sinks_are_those_of_attention(softcap):
    generator = torch.Generator().manual_seed(3)
    rows, sinks = torch.tensor([0, 1, 5, 9]), torch.tensor([0.0, 2.0, -1.0, 200.0])
    q, k = (2 * torch.randn(10, heads, 8, generator=generator) for heads in (4, 2))
    logits = own_logits(q, k, rows, 0.5, softcap)
    mean, norm = mean_attention_of(logits.clone(), sinks)
    expected = mean_attention(q[rows], k, torch.zeros_like(rows), rows + 1, 0.5, softcap, sinks)
    torch.testing.assert_close(mean, expected, atol=1e-7, rtol=1e-4)
    # Whatever a sink takes: a head's own part of the mean is by its norm.
    torch.testing.assert_close((logits - norm[..., None]).exp().mean(0), mean)


def test_a_cap_is_taken_back_up_to_where_it_hides_everything():
    logits, most = torch.linspace(-30, 30, 61), 4 * math.atanh(0.99)
    found = uncapped(cap_logits(logits, 4.0), 4.0)
    torch.testing.assert_close(found, logits.clamp(-most, most), rtol=1e-4, atol=1e-5)
    assert uncapped(logits, None) is logits


def test_partial_rope_pairs_are_those_that_rope_turns():
    """Turning a head must turn each pair (p, p + D/2) of the reordered head as one, or not at all."""
    dim, rotary = 12, 8
    angle = torch.rand(1, 1, rotary // 2).repeat(1, 1, 2)
    head = torch.randn(1, 1, 1, dim)
    turned = apply_rope(head, angle.cos(), angle.sin())
    order = pair_order(dim, rotary)
    before, after = head[..., order].unflatten(-1, (2, -1)), turned[..., order].unflatten(-1, (2, -1))
    torch.testing.assert_close(before.norm(dim=-2), after.norm(dim=-2))
    assert torch.equal(before[..., rotary // 2 :], after[..., rotary // 2 :])
    assert sorted(order.tolist()) == list(range(dim))


def test_greedy_selection_prefers_what_explains_and_regresses_the_rest_out():
    # Pair 1 is a copy of pair 0: once one of them is in, the other explains nothing.
    generator = torch.Generator().manual_seed(0)
    parts = torch.randn(4000, 6, generator=generator).double()
    parts[:, 1], parts[:, 4] = parts[:, 0], parts[:, 3]
    parts[:, 2] *= 0.5
    cov = (parts.T @ parts / len(parts))[None]
    picked, coef, explained = pick_pairs(cov, 2, 1)
    assert set(picked[0].tolist()) in ({0, 2}, {1, 2})
    assert explained == pytest.approx(1, abs=1e-3)
    copied = picked[0].tolist().index(0) if 0 in picked[0] else picked[0].tolist().index(1)
    assert float(coef[0, copied, 0]) == pytest.approx(2, abs=0.05)


def test_ridge_recovers_a_linear_map():
    x = torch.randn(500, 5, generator=torch.Generator().manual_seed(1))
    weight, bias = torch.randn(5, 2), torch.tensor([1.0, -2.0])
    found, found_bias, fit = ridge(x, x @ weight + bias)
    torch.testing.assert_close(found, weight, atol=0.05, rtol=0.05)
    torch.testing.assert_close(found_bias, bias, atol=0.05, rtol=0.05)
    assert fit > 0.999
