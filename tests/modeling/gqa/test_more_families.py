"""Families whose parts are those of the ones that are put to every test: each put together and run once."""

import math

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from fulmen.modeling.checkpoint import dense_view
from fulmen.modeling.families import dsa_family_for
from tests.modeling.gqa.test_gqa_models import CLOSE, LENGTH, ROOMY, TIGHT, in_chunks, left_padded
from tests.modeling.gqa.tiny_gqa import MORE, make_dense, make_dsa, random_ids

EXPERT_MODELS = ["mixtral", "qwen2-moe", "qwen3-moe", "granite-moe", "glm4-moe"]


@pytest.mark.parametrize("name", MORE)
def test_up_to_k_it_is_the_dense_model(name):
    """A prompt at once, padded rows in chunks, and what is generated after padding."""
    dense = make_dense(name)
    dsa = make_dsa(dense, ROOMY)
    ids, mask, position_ids = left_padded(random_ids(2, LENGTH), [0, 9])
    inputs = {"attention_mask": mask, "position_ids": position_ids}
    with torch.no_grad():
        expected = dense(ids, **inputs).logits
        torch.testing.assert_close(dsa(ids[:1]).logits, expected[:1], **CLOSE)
        chunked = in_chunks(dsa, ids, [10, 12, 1, 1], **inputs)
    torch.testing.assert_close(chunked[0], expected[0], **CLOSE)
    torch.testing.assert_close(chunked[1, 9:], expected[1, 9:], **CLOSE)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "attention_mask": mask}
    assert torch.equal(dsa.generate(ids, **settings), dense.generate(ids, **settings))


@pytest.mark.parametrize("name", MORE)
def test_above_k_it_is_sparse_and_the_same_when_saved(name, tmp_path):
    """With inherited indexers; however the text is fed."""
    dense = make_dense(name)
    dsa = make_dsa(dense, TIGHT)
    fits = dsa_family_for(dsa.config).inherit(dsa, random_ids(2, 48))
    assert all(math.isfinite(fit.kl) and fit.key_fit > 0.3 for fit in fits)
    ids = random_ids(1, LENGTH)
    with torch.no_grad():
        sparse, full = dsa(ids).logits, dense(ids).logits
        torch.testing.assert_close(in_chunks(dsa, ids, [9, 1, 14]), sparse, **CLOSE)
        assert (sparse[:, -1] - full[:, -1]).abs().max() > 1e-3
        dsa.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert type(loaded) is type(dsa)
        assert torch.equal(loaded(ids).logits, sparse)
        assert torch.equal(dense_view(tmp_path)(ids).logits, full)


@pytest.mark.parametrize("name", EXPERT_MODELS)
def test_experts_learn_and_are_balanced_as_in_the_dense_model(name):
    """Loss, the routers' part of it and gradients where k covers the text."""
    changes = {} if name == "glm4-moe" else {"output_router_logits": True}
    dense = make_dense(name, **changes)
    dsa = make_dsa(dense, ROOMY)
    ids = random_ids(2, LENGTH)
    losses, gradients = [], []
    for model in (dense, dsa):
        model.train().zero_grad()
        output = model(ids, labels=ids)
        output.loss.backward()
        losses.append((output.loss, getattr(output, "aux_loss", None) or output.loss))
        gradients.append(next(p.grad.clone() for n, p in model.named_parameters() if "experts" in n))
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)


def test_a_model_of_experts_runs_them_as_the_stock_class_does():
    """Transformers groups the tokens of an expert, unless it does not know that it can."""
    names = {make_dsa(make_dense(name)).config._experts_implementation for name in EXPERT_MODELS}
    assert names == {"grouped_mm"}


def test_the_experts_of_a_checkpoint_are_stored_one_by_one(tmp_path):
    """As the model hub has them and engines read them."""
    dense = make_dense("qwen3-moe")
    make_dsa(dense).save_pretrained(tmp_path)
    stored = {name for name in load_names(tmp_path) if ".indexer." not in name}
    dense.save_pretrained(tmp_path / "dense")
    assert stored == load_names(tmp_path / "dense")
    assert "model.layers.0.mlp.experts.5.gate_proj.weight" in stored


def load_names(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())
