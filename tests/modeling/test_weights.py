"""Weights and config: what is in the file is in the model, and the other way round, or it is said."""

import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fulmen import CheckpointError
from fulmen.config import DsaConfig
from fulmen.modeling.checkpoint import dense_view, load_dense, load_directory, save_converted
from fulmen.modeling.families import family_for, full_attention_layers, set_topk
from fulmen.modeling.weights import load_all_weights
from tests.modeling.gqa.tiny_gqa import make_dense, make_dsa, random_ids
from tests.modeling.mla.tiny_mla import make_mla
from tests.modeling.tiny_source import (
    EMBEDDING,
    HEAD,
    WEIGHTS,
    edit_json,
    edit_weights,
    make_tokenizer,
    own_head,
    save_source,
)


@pytest.fixture(scope="module")
def whole_dir(tmp_path_factory):
    return save_source(tmp_path_factory.mktemp("whole") / "model")


@pytest.fixture(scope="module")
def whole_dsa_dir(tmp_path_factory):
    model = make_dsa(make_dense("llama"))
    return save_converted(model, make_tokenizer(), tmp_path_factory.mktemp("whole") / "dsa", "")


@pytest.fixture
def source(whole_dir, tmp_path):
    return Path(shutil.copytree(whole_dir, tmp_path / "source"))


@pytest.fixture
def converted(whole_dsa_dir, tmp_path):
    return Path(shutil.copytree(whole_dsa_dir, tmp_path / "converted"))


def message_of(load, place) -> str:
    with pytest.raises(CheckpointError) as info:
        load(place)
    message = str(info.value)
    assert "\n" not in message
    assert "above" not in message
    assert str(place) in message
    return message


def logits(model) -> torch.Tensor:
    ids = random_ids(1, 20) % model.config.vocab_size
    with torch.no_grad():
        return model.eval()(ids).logits


class TestAHeadOfItsOwn:
    """config.json says tied, the file has a head: Transformers' stock model says what is right."""

    @pytest.fixture(params=["llama", "qwen2", "qwen3", "mistral", "gemma3", "v3", "v2"])
    def dense(self, request):
        if request.param in ("v2", "v3"):
            return make_mla(request.param, tie_word_embeddings=True, first_k_dense_replace=3)
        return make_dense(request.param, tie_word_embeddings=True)

    @pytest.fixture
    def source(self, dense, tmp_path):
        folder = save_source(tmp_path / "source", dense)
        own_head(folder)
        return folder

    def convert(self, source, out):
        dense, tokenizer = load_dense(source)
        mla = dense.config.model_type.startswith("deepseek")
        layers = tuple(full_attention_layers(dense.config))
        dsa = DsaConfig(4, 4, 1, 16, layers) if mla else DsaConfig(4, 4, 2, 8, layers)
        model = family_for(dense.config).from_dense(dense, dsa)
        return model, save_converted(model, tokenizer, out, "")

    def test_survives_conversion_saving_and_loading(self, source, tmp_path):
        expected = logits(AutoModelForCausalLM.from_pretrained(source))
        model, out = self.convert(source, tmp_path / "out")
        for converted in (model, AutoModelForCausalLM.from_pretrained(out), load_directory(out)[0]):
            assert not converted.config.tie_word_embeddings
            set_topk(converted, 64)
            assert torch.allclose(logits(converted), expected, atol=2e-5)
        if hasattr(model.config, "dsa"):
            assert torch.equal(logits(dense_view(out)), expected)
        assert torch.equal(load_file(out / WEIGHTS)[HEAD], load_file(source / WEIGHTS)[HEAD])

    def test_survives_where_the_caller_loaded_the_dense_model(self, source):
        dense = AutoModelForCausalLM.from_pretrained(source)
        assert dense.config.tie_word_embeddings  # Transformers leaves the config as it was
        if dense.config.model_type.startswith("deepseek"):
            model = family_for(dense.config).from_dense(dense, DsaConfig(64, 4, 1, 16, (0, 1, 2)))
        else:
            model = make_dsa(dense, topk=64)
        assert torch.allclose(logits(model), logits(dense), atol=2e-5)


def test_a_head_equal_to_the_embedding_is_tied(tmp_path):
    folder = save_source(tmp_path / "source", make_dense("llama", tie_word_embeddings=True))
    edit_weights(folder, {HEAD: load_file(folder / WEIGHTS)[EMBEDDING].clone()})
    model = make_dsa(load_dense(folder)[0])
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight is model.model.embed_tokens.weight
    save_converted(model, make_tokenizer(), tmp_path / "out", "")
    assert HEAD not in load_file(tmp_path / "out" / WEIGHTS)


def test_a_head_alone_is_both(tmp_path):
    folder = save_source(tmp_path / "source", make_dense("llama", tie_word_embeddings=True))
    expected = logits(load_dense(folder)[0])
    edit_weights(folder, {HEAD: load_file(folder / WEIGHTS)[EMBEDDING].clone(), EMBEDDING: None})
    model, _ = load_dense(folder)
    assert model.config.tie_word_embeddings
    assert torch.equal(logits(model), expected)


def test_neither_head_nor_embedding(tmp_path):
    folder = save_source(tmp_path / "source", make_dense("llama", tie_word_embeddings=True))
    edit_weights(folder, {EMBEDDING: None})
    assert "lacks" in message_of(load_dense, folder)


def test_a_converted_model_whose_head_was_tuned_later(tmp_path):
    """Its config still says tied."""
    model = make_dsa(make_dense("llama", tie_word_embeddings=True), topk=64)
    folder = save_converted(model, make_tokenizer(), tmp_path / "dsa", "")
    head = own_head(folder)
    loaded, tokenizer = load_directory(folder)
    assert torch.equal(loaded.lm_head.weight, head)
    again = save_converted(loaded, tokenizer, tmp_path / "again", "")
    assert not AutoModelForCausalLM.from_pretrained(again).config.tie_word_embeddings
    assert torch.equal(load_file(again / WEIGHTS)[HEAD], head)
    assert torch.equal(dense_view(folder).lm_head.weight, head)


class TestWeightsThatDoNotFit:
    @pytest.mark.parametrize(
        ("extra", "shown"),
        [
            ("model.layers.0.self_attn.q_proj.bias", 64),
            ("model.layers.1.self_attn.q_norm.weight", 16),
            ("model.layers.2.mlp.up_proj.bias", 96),
            ("model.layers.3.mlp.up_proj.weight", 4),
            ("model.layers.0.self_attn.q_proj.lora_A.weight", 8),
            ("model.layers.61.mlp.up_proj.weight", 4),
            ("lm_head.bias", 97),
            ("score.weight", 2),
        ],
    )
    @pytest.mark.parametrize("load", [load_dense, load_directory])
    def test_unexpected(self, source, converted, load, extra, shown):
        place = source if load is load_dense else converted
        edit_weights(place, {extra: torch.zeros(shown)})
        message = message_of(load, place)
        assert "holds 1 weights that config.json does not ask for" in message
        assert extra in message
        if load is load_directory:
            assert extra in message_of(dense_view, place)

    def test_the_first_few_of_many_are_named(self, source):
        attentions = [f"model.layers.{layer}.self_attn" for layer in range(3)]
        names = [f"{attention}.{part}_proj.bias" for attention in attentions for part in "kqv"]
        edit_weights(source, {name: torch.zeros(64) for name in names})
        message = message_of(load_dense, source)
        assert "holds 9 weights" in message
        assert message.count(".bias") == 3

    def test_tables_that_every_model_makes_itself_are_no_weights(self, source):
        expected = logits(load_dense(source)[0])
        tables = ("rotary_emb.inv_freq", "rotary_emb.cos_cached")
        edit_weights(source, {f"model.layers.0.self_attn.{table}": torch.zeros(8) for table in tables})
        assert torch.equal(logits(load_dense(source)[0]), expected)

    def test_an_untied_model_without_its_head(self, source):
        edit_weights(source, {HEAD: None})
        message = message_of(load_dense, source)
        assert "lacks 1 weights, the first lm_head.weight" in message
        assert "tie_word_embeddings" in message

    @pytest.mark.parametrize("part", ["layers.1.self_attn.indexer", "layers.2.mlp.up_proj", "model.norm"])
    def test_missing_from_a_converted_model(self, converted, part):
        lost = next(name for name in load_file(converted / WEIGHTS) if part in name)
        edit_weights(converted, {lost: None})
        assert f"lacks 1 weights, the first {lost}" in message_of(load_directory, converted)

    @pytest.mark.parametrize(
        "change", [{"hidden_size": 32, "head_dim": 16}, {"intermediate_size": 48}, {"vocab_size": 120}]
    )
    def test_of_another_shape(self, source, converted, change):
        for place, load in ((source, load_dense), (converted, load_directory), (converted, dense_view)):
            edit_json(place / "config.json", **change)
            message = message_of(load, place)
            assert "of another shape than config.json says" in message
            assert ".weight: [" in message

    def test_too_many_layers_in_the_config(self, source):
        edit_json(source / "config.json", num_hidden_layers=4)
        assert "lacks 9 weights, the first model.layers.3." in message_of(load_dense, source)

    def test_experts_of_one_layer(self, tmp_path):
        """Transformers joins them while it loads, and would point to a report that nobody sees."""
        folder = save_source(tmp_path / "source", make_mla("v3"))
        lost = next(name for name in load_file(folder / WEIGHTS) if "experts.3." in name)
        edit_weights(folder, {lost: None})
        message_of(load_dense, folder)


class TestLayersThatPredictFurtherTokens:
    def folder(self, tmp_path, **changes):
        folder = save_source(tmp_path / "source", make_mla("v3"))
        edit_json(folder / "config.json", **changes)
        held = load_file(folder / WEIGHTS)
        layer = {name.replace("s.2.", "s.3."): held[name].clone() for name in held if "layers.2." in name}
        layer["model.layers.3.eh_proj.weight"] = torch.zeros(64, 128)
        edit_weights(folder, layer)
        return folder

    def test_are_left_out_and_said_once(self, tmp_path, caplog):
        folder = self.folder(tmp_path, num_nextn_predict_layers=1)
        with caplog.at_level(logging.WARNING):
            model, _ = load_dense(folder)
        assert torch.equal(logits(model), logits(make_mla("v3")))
        assert ["layer 3 predicts further tokens" in message for message in caplog.messages] == [True]

    def test_a_layer_that_is_none_of_them_is_refused(self, tmp_path):
        folder = self.folder(tmp_path, num_nextn_predict_layers=1)
        edit_weights(folder, {"model.layers.3.eh_proj.weight": None})
        assert "model.layers.3." in message_of(load_dense, folder)

    def test_are_refused_where_the_config_knows_of_none(self, tmp_path):
        folder = self.folder(tmp_path, num_nextn_predict_layers=0)
        assert "model.layers.3." in message_of(load_dense, folder)


def test_logits_that_are_capped_stay_so(tmp_path):
    """Transformers' default, SDPA, leaves the caps out."""
    dense, ids = make_dense("gemma2"), random_ids(1, 20)
    dense.save_pretrained(tmp_path)
    loaded = load_all_weights(str(tmp_path))
    with torch.no_grad():
        expected = dense(ids).logits
        torch.testing.assert_close(loaded(ids).logits, expected)
        loaded.set_attn_implementation("sdpa")
        assert (loaded(ids).logits - expected).abs().max() > 0.01
