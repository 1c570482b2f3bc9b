"""A model whose layers are read as they run computes what the whole one does, bit for bit."""

import pytest
import torch
from transformers.utils.logging import disable_progress_bar

from fulmen import CheckpointError, UnsupportedModelError
from fulmen.modeling import shards
from fulmen.modeling.by_layers import layered_model, layers_as_they_run, layers_skipped
from fulmen.modeling.checkpoint import load_dense
from fulmen.modeling.config_checks import read_own_config
from fulmen.modeling.families import dsa_family_for, family_for
from fulmen.modeling.index_shape import default_dsa
from fulmen.modeling.mla.attention import fulmen_attention
from fulmen.modeling.model_shards import ModelShards
from fulmen.modeling.selectors import DenseSelector, use_selector
from tests.modeling.gqa.tiny_gqa import FAMILIES, make_dense, random_ids
from tests.modeling.mla.tiny_mla import make_mla, mla_ids
from tests.modeling.tiny_source import (
    EMBEDDING,
    HEAD,
    WEIGHTS,
    edit_json,
    edit_weights,
    load_file,
    make_tokenizer,
    own_head,
    save_source,
)

disable_progress_bar()
CPU = torch.device("cpu")


def both_of(folder, index=None):
    """(layered, whole) of a source."""
    config = read_own_config(str(folder))
    dsa = default_dsa(config, 8, index=index)
    layered = layered_model(config, dsa, ModelShards(folder, config), CPU)
    return layered, family_for(config).from_dense(load_dense(folder)[0], dsa)


@torch.no_grad()
def dense_logits(model, ids):
    with use_selector(model, DenseSelector()):
        hidden = model.base_model(ids, use_cache=False).last_hidden_state
    return model.get_output_embeddings()(hidden)


# And experts that are stored one by one, under two kinds of names.
@pytest.mark.parametrize("name", [*FAMILIES, "qwen3-moe", "mixtral"])
def test_computes_and_inherits_as_the_whole_model(name, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "BLOCK_BYTES", 3000)
    dense = make_dense(name, torch.bfloat16)
    dense.config.dtype = torch.bfloat16
    dense.save_pretrained(tmp_path, max_shard_size="40KB")
    make_tokenizer().save_pretrained(tmp_path)
    (layered, whole), ids, made = both_of(tmp_path, "two-level"), random_ids(2, 64), {}
    assert len(layered.shards.files) > 3
    assert {**layered.model.config.to_dict(), "architectures": None} == whole.config.to_dict()

    def keep(fit):
        made.update({key: x.clone() for key, x in layered.indexer_state(fit.layer).items()})

    with layers_as_they_run(layered, lambda layer: None):
        assert torch.equal(dense_logits(layered.model, ids), dense_logits(whole, ids))
        fits = dsa_family_for(whole.config).inherit(layered.model, ids, keep)
    assert fits == dsa_family_for(whole.config).inherit(whole, ids)
    assert made.keys() == {key for key in whole.state_dict() if ".indexer." in key}
    assert all(torch.equal(whole.state_dict()[key], x) for key, x in made.items())
    assert all(x.is_meta for x in layered.layers.parameters())
    assert not any("forward" in vars(module) for module in layered.model.modules())


@pytest.mark.parametrize("kind", ["v3", "lite"])
def test_mla_computes_and_inherits_as_the_whole_model(kind, tmp_path):
    """Experts are stored one by one; what its class keeps in float32 stays so."""
    dense = make_mla(kind).bfloat16()
    dense.config.dtype = torch.bfloat16
    dense.save_pretrained(tmp_path, max_shard_size="40KB")
    make_tokenizer(dense.config.vocab_size).save_pretrained(tmp_path)
    (layered, whole), ids, made = both_of(tmp_path), mla_ids(2, 64), {}

    def keep(fit):
        made.update({key: x.clone() for key, x in layered.indexer_state(fit.layer).items()})

    with layers_as_they_run(layered, lambda layer: None):
        fits = dsa_family_for(whole.config).inherit(layered.model, ids, keep)
        with fulmen_attention(layered.model), fulmen_attention(whole):
            assert torch.equal(dense_logits(layered.model, ids), dense_logits(whole, ids))
    assert fits == dsa_family_for(whole.config).inherit(whole, ids)
    assert made.keys() == {key for key in whole.state_dict() if ".indexer." in key}
    assert all(torch.equal(whole.state_dict()[key], x) for key, x in made.items())


def test_skipped_layers_give_what_they_gave(tmp_path):
    layered, ids, states = both_of(save_source(tmp_path))[0], random_ids(1, 30), []
    hook = layered.layers[1].register_forward_hook(lambda _, __, x_BTC: states.append(x_BTC))
    with layers_as_they_run(layered, lambda layer: None):
        expected = dense_logits(layered.model, ids)
        hook.remove()
        ran = [layer.mlp.register_forward_hook(lambda *_: states.append(0)) for layer in layered.layers]
        with layers_skipped(layered, 1, states[0]):
            assert torch.equal(dense_logits(layered.model, ids), expected)
    assert len(states) == 2
    assert len(ran) == 3


class TestTiedWeights:
    @pytest.fixture
    def source(self, tmp_path):
        return save_source(tmp_path / "source", make_dense("llama", tie_word_embeddings=True))

    def require_equal(self, folder, tied):
        (layered, whole), ids = both_of(folder), random_ids(1, 20)
        assert layered.model.config.tie_word_embeddings is whole.config.tie_word_embeddings is tied
        with layers_as_they_run(layered, lambda layer: None):
            assert torch.equal(dense_logits(layered.model, ids), dense_logits(whole, ids))

    def test_saved_once(self, source):
        self.require_equal(source, tied=True)

    def test_saved_twice(self, source):
        edit_weights(source, {HEAD: load_file(source / WEIGHTS)[EMBEDDING].clone()})
        self.require_equal(source, tied=True)

    def test_saved_under_the_heads_name(self, source):
        edit_weights(source, {HEAD: load_file(source / WEIGHTS)[EMBEDDING].clone(), EMBEDDING: None})
        self.require_equal(source, tied=True)

    def test_a_head_of_its_own_survives(self, source):
        own_head(source)
        self.require_equal(source, tied=False)


class TestRefused:
    def refusal(self, folder, error=CheckpointError):
        config = read_own_config(str(folder))
        dsa, held = default_dsa(config, 8), ModelShards(folder, config)
        with pytest.raises(error) as info:
            layered_model(config, dsa, held, CPU)
        return str(info.value)

    def test_a_part_of_another_model(self, tmp_path):
        folder = save_source(tmp_path)
        edit_weights(folder, {"model.layers.1.mlp.up_proj.weight": torch.zeros(48, 64)})
        said = self.refusal(folder)
        assert "1 weights of another shape than config.json says" in said
        assert "model.layers.1.mlp.up_proj.weight: [48, 64], not [96, 64]" in said

    def test_weights_too_many_or_too_few(self, tmp_path):
        folder = save_source(tmp_path)
        edit_weights(folder, {"model.norm.weight": None, "model.norm.bias": torch.zeros(64)})
        said = self.refusal(folder)
        assert "config.json does not ask for, as model.norm.bias" in said
        assert "lacks 1 weights, the first model.norm.weight" in said

    def test_a_head_that_no_one_saved(self, tmp_path):
        folder = save_source(tmp_path, make_dense("llama", tie_word_embeddings=True))
        edit_json(folder / "config.json", tie_word_embeddings=False)
        assert "lacks 1 weights, the first lm_head.weight" in self.refusal(folder)

    def test_weights_that_a_conversion_changes(self, tmp_path):
        folder = save_source(tmp_path, make_mla("v3", q_lora_rank=None))
        said = self.refusal(folder, UnsupportedModelError)
        assert "'deepseek_v3' cannot be converted layer by layer" in said


def test_types_may_be_mixed(tmp_path):
    folder, name = save_source(tmp_path), "model.layers.0.input_layernorm.weight"
    edit_json(folder / "config.json", dtype="bfloat16")
    edit_weights(folder, {name: load_file(folder / WEIGHTS)[name].bfloat16()})
    (layered, whole), ids = both_of(folder), random_ids(1, 20)
    assert layered.shards.kinds == ["BF16", "F32"]
    with layers_as_they_run(layered, lambda layer: None):
        assert torch.equal(dense_logits(layered.model, ids), dense_logits(whole, ids))
