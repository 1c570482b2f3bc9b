"""The inherited indexer finds what the attention reads, far better than a random one, without training."""

import pytest
import torch

from fulmen.errors import ConfigError, UnsupportedModelError
from fulmen.modeling.intervals import visible_intervals
from fulmen.modeling.mla.attention import fulmen_attention, mla_loss_inputs
from fulmen.modeling.mla.convert import convert_mla
from fulmen.modeling.mla.fit import (
    group_alike,
    reduced_rank_directions,
    ridge_regression,
    steadying_factor,
)
from fulmen.modeling.mla.inherit import inherit_mla
from fulmen.modeling.selectors import DenseSelector, use_selector
from fulmen.ops.losses.indexer import indexer_loss
from fulmen.ops.scores import index_scores
from tests.modeling.mla.tiny_mla import make_mla, mla_ids

LENGTH, TOPK = 192, 24


def make_peaky(seed: int, **changes):
    """A V3 model whose heads attend to few tokens, and whose tokens have a mean, as real ones have."""
    model = make_mla("v3", seed, first_k_dense_replace=3, **changes)
    with torch.no_grad():
        for layer in model.model.layers:
            (layer.self_attn.q_b_proj or layer.self_attn.q_proj).weight.mul_(2.5)
            layer.self_attn.o_proj.weight.mul_(0.5)
            layer.mlp.down_proj.weight.mul_(0.5)
        embedding = model.model.embed_tokens.weight
        embedding += 0.5 * torch.randn(embedding.shape[1], generator=torch.Generator().manual_seed(seed))
    return model


def convert_peaky(seed: int, heads: int = 8, width: int = 24, **changes):
    torch.manual_seed(seed)
    source = make_peaky(seed, **changes)
    return convert_mla(source, topk=TOPK, index_n_heads=heads, index_head_dim=width)


@torch.no_grad()
def captured_mass(model, ids) -> tuple[float, float]:
    """Share of the mean attention that the best TOPK keys hold: by index score, and at most (the oracle)."""
    found, best = [], []
    seen = visible_intervals(None, None, *ids.shape, 0, ids.device)
    hidden = []
    hooks = [
        layer.self_attn.register_forward_pre_hook(
            lambda module, _args, kwargs: hidden.append(
                (module, kwargs["hidden_states"], kwargs["position_embeddings"])
            ),
            with_kwargs=True,
        )
        for layer in model.model.layers
    ]
    with fulmen_attention(model), use_selector(model, DenseSelector()):
        model(ids)
    for hook in hooks:
        hook.remove()
    for attention, x_BTC, rotary in hidden:
        index, q_BTHD, k_BSGD, scale = mla_loss_inputs(attention, x_BTC, rotary)
        scores_BTS = index_scores(*index, seen.start_BT, seen.stop_BT)
        logits = torch.einsum("bthd,bsd->bths", q_BTHD, k_BSGD[:, :, 0]) * scale
        logits = logits.masked_fill((scores_BTS == -torch.inf)[:, :, None], -torch.inf)
        target_BTS = logits.softmax(-1).mean(2)
        found.append(target_BTS.gather(-1, scores_BTS.topk(TOPK).indices).sum(-1)[:, TOPK:].mean())
        best.append(target_BTS.topk(TOPK).values.sum(-1)[:, TOPK:].mean())
    return float(torch.stack(found).mean()), float(torch.stack(best).mean())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("heads", "width", "share"),
    [(8, 24, 0.65), (4, 24, 0.45), (16, 24, 0.65), (8, 12, 0.35)],
    ids=["one-each", "fewer-heads", "more-heads", "narrow"],
)
def test_inherited_captures_much_more_than_random(seed, heads, width, share):
    model = convert_peaky(seed, heads, width)
    held_out = mla_ids(2, LENGTH, seed=100)
    random_mass, oracle_mass = captured_mass(model, held_out)
    layers = inherit_mla(model, mla_ids(2, LENGTH, seed=1))
    mass, same_oracle = captured_mass(model, held_out)
    assert same_oracle == oracle_mass, "the trunk must not change"
    assert mass > random_mass + share * (oracle_mass - random_mass)
    assert all(layer.gate_positive > 0.95 for layer in layers)


@pytest.mark.parametrize(
    "changes", [{"attention_bias": True}, {"q_lora_rank": None}, {"rope_interleave": False}], ids=str
)
def test_inherits_from_every_kind_of_source(changes):
    model = convert_peaky(0, **changes)
    held_out = mla_ids(2, LENGTH, seed=100)
    random_mass, oracle_mass = captured_mass(model, held_out)
    inherit_mla(model, mla_ids(3, LENGTH, seed=1))
    assert captured_mass(model, held_out)[0] > random_mass + 0.6 * (oracle_mass - random_mass)


@torch.no_grad()
def test_selection_by_it_keeps_the_models_output():
    model = convert_peaky(0)
    ids = mla_ids(2, LENGTH, seed=100)
    with fulmen_attention(model), use_selector(model, DenseSelector()):
        dense = model(ids).logits.log_softmax(-1)

    def divergence():
        sparse = model(ids).logits.log_softmax(-1)
        return float((dense.exp() * (dense - sparse)).sum(-1).mean())

    before = divergence()
    inherit_mla(model, mla_ids(3, LENGTH, seed=1))
    assert divergence() < 0.4 * before


def test_scale_is_where_the_warm_up_would_put_it():
    model = convert_peaky(0)
    (layer, *_) = inherit_mla(model, mla_ids(2, LENGTH, seed=1))
    weights = model.model.layers[0].self_attn.indexer.weights_proj.weight
    for factor in (0.7, 1.4):
        kept = weights.data.clone()
        weights.data.mul_(factor)
        worse = first_layer_kl(model, mla_ids(2, LENGTH, seed=1))
        weights.data.copy_(kept)
        assert worse > first_layer_kl(model, mla_ids(2, LENGTH, seed=1))
    assert layer.kl < 0.6


@torch.no_grad()
def first_layer_kl(model, ids) -> float:
    hidden = model.model.embed_tokens(ids)
    rotary = model.model.rotary_emb(hidden, torch.arange(ids.shape[1])[None])
    layer = model.model.layers[0]
    seen = visible_intervals(None, None, *ids.shape, 0, ids.device)
    index, q_BTHD, k_BSGD, scale = mla_loss_inputs(layer.self_attn, layer.input_layernorm(hidden), rotary)
    return float(indexer_loss(*index, q_BTHD, k_BSGD, seen.start_BT, seen.stop_BT, scale).kl_BT.mean())


def test_wide_index_heads_leave_unused_dims_empty():
    model = convert_peaky(0, width=64)
    (layer, *_) = inherit_mla(model, mla_ids(2, LENGTH, seed=1))
    assert layer.key_fit > 0.9
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_other_models_and_settings_are_refused():
    with pytest.raises(UnsupportedModelError, match="DeepseekV3ForCausalLM"):
        inherit_mla(make_mla("v3"), mla_ids(1, 8))
    with pytest.raises(ConfigError, match="index_head_dim=9"):
        inherit_mla(convert_peaky(0, width=9), mla_ids(1, 8))
    with pytest.raises(ConfigError, match="no calibration tokens"):
        inherit_mla(convert_peaky(0), mla_ids(0, 8))


def test_reduced_rank_directions_predict_best_and_are_whitened():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(400, 6, generator=generator, dtype=torch.float64) @ torch.diag(
        torch.arange(1.0, 7).double()
    )
    outputs = inputs[:, :2] @ torch.randn(2, 5, generator=generator, dtype=torch.float64) + 3
    rows = reduced_rank_directions(inputs, outputs, torch.eye(5).double(), 2)
    products = (inputs - inputs.mean(0)) @ rows.T
    torch.testing.assert_close(products.T @ products / 400, torch.eye(2).double(), rtol=0, atol=1e-4)
    centred = outputs - outputs.mean(0)
    rest = centred - products @ ridge_regression(products, centred, 0.0)
    assert rest.square().sum() < 1e-6 * centred.square().sum()


def test_steadying_factor_is_the_best_of_all():
    generator = torch.Generator().manual_seed(0)
    fixed = 5 + torch.rand(1000, generator=generator)
    extra = 4 + 0.4 * torch.rand(1000, generator=generator)

    def unsteadiness(factor):
        total = fixed + factor * extra
        return float(total.std() / total.mean())

    best = steadying_factor(fixed, extra)
    assert best > 0
    ladder = torch.linspace(0, float(fixed.mean() / extra.mean()), 50).tolist()
    assert unsteadiness(best) <= min(unsteadiness(factor) for factor in ladder) + 1e-4
    assert steadying_factor(extra, fixed * torch.rand(1000, generator=generator)) < 0.1


def test_alike_heads_are_grouped():
    basis = torch.randn(3, 10, generator=torch.Generator().manual_seed(0))
    items = basis[[0, 1, 2, 1, 0, 2]] * torch.tensor([1.0, 2, 1, 1, 3, 1])[:, None]
    assert group_alike(items @ items.T, 3) == [[0, 4], [1, 3], [2, 5]]
    assert sorted(map(len, group_alike(torch.eye(7), 3))) == [2, 2, 3]
