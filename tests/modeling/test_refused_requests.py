"""What a DSA model cannot give is refused in words wherever it is asked for, and what it can give works."""

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationConfig

from fulmen.errors import ConfigError
from fulmen.modeling.mla.attention import fulmen_attention
from tests.modeling.gqa.tiny_gqa import make_dense, make_dsa, make_v32, pair, random_ids

ATTENTIONS = ("eager", "sdpa", "flash_attention_2", "flex_attention", "paged|eager", {"": "sdpa"})
NO_WEIGHTS = "output_attentions=True cannot be given.*leave it out"


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def saved(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    make_dsa(make_dense(request.param), topk=6).save_pretrained(folder)
    return folder


class TestAttentionWeights:
    def test_in_a_forward_pass(self):
        _, dsa = pair("llama", 6)
        for model in (dsa, dsa.model):
            with pytest.raises(ConfigError, match=NO_WEIGHTS):
                model(random_ids(1, 12), output_attentions=True)
            assert model(random_ids(1, 4), output_attentions=False).attentions is None

    @pytest.mark.parametrize(
        "settings",
        [
            {"output_attentions": True, "return_dict_in_generate": True},
            {"generation_config": GenerationConfig(output_attentions=True, return_dict_in_generate=True)},
        ],
    )
    def test_in_generate(self, settings):
        _, dsa = pair("llama", 6)
        with pytest.raises(ConfigError, match=NO_WEIGHTS):
            dsa.generate(random_ids(1, 4), **{"max_new_tokens": 2, **settings})

    def test_in_the_config(self, saved):
        model = AutoModelForCausalLM.from_pretrained(saved)
        model.config._attn_implementation = "eager"
        model.config.output_attentions = True
        with pytest.raises(ConfigError, match=NO_WEIGHTS):
            model(random_ids(1, 4))
        for auto in (AutoModel, AutoModelForCausalLM):
            with pytest.raises(ConfigError, match=NO_WEIGHTS):
                auto.from_pretrained(saved, output_attentions=True)

    def test_in_a_model_of_transformers_under_our_attention(self):
        model = make_v32()
        with fulmen_attention(model), pytest.raises(ConfigError, match=NO_WEIGHTS):
            model(random_ids(1, 4), output_attentions=True)
        assert model(random_ids(1, 4), output_attentions=False).attentions is None

    def test_a_source_that_returns_them_still_converts(self):
        dense = make_dense("llama")
        dense.set_attn_implementation("eager")
        dense.config.output_attentions = True
        assert dense(random_ids(1, 4)).attentions[0] is not None
        torch.testing.assert_close(
            make_dsa(dense, topk=64)(random_ids(1, 9)).logits, dense(random_ids(1, 9)).logits
        )


class TestAttentionNames:
    @pytest.mark.parametrize("name", ATTENTIONS, ids=str)
    @pytest.mark.parametrize("auto", [AutoModel, AutoModelForCausalLM])
    def test_another_is_refused_at_load(self, auto, name, saved):
        with pytest.raises(
            ConfigError, match=r"attn_implementation='.*' cannot be set; DSA models run 'fulmen'"
        ):
            auto.from_pretrained(saved, attn_implementation=name)
        config = AutoConfig.from_pretrained(saved)
        with pytest.raises(ConfigError, match="cannot be set"):
            auto.from_config(config, attn_implementation=name)

    def test_its_own_or_none_is_taken_and_saved_models_say_none(self, saved, tmp_path):
        plain = AutoModelForCausalLM.from_pretrained(saved)
        named = AutoModelForCausalLM.from_pretrained(saved, attn_implementation="fulmen")
        again = AutoModelForCausalLM.from_config(named.config)
        assert {model.config._attn_implementation for model in (plain, named, again)} == {"fulmen"}
        named.save_pretrained(tmp_path)
        assert "attn" not in (tmp_path / "config.json").read_text().replace("self_attn", "")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(loaded(random_ids(1, 9)).logits, plain(random_ids(1, 9)).logits)


class TestWhatWorks:
    """Options of Transformers that could be ignored in silence, and are not."""

    def test_a_tuple_in_place_of_a_dict(self):
        dense, dsa = pair("llama", 64)
        ids = random_ids(1, 9)
        for model in (dense, dsa):
            output = model(ids, return_dict=False)
            assert isinstance(output, tuple)
            torch.testing.assert_close(output[0], dense(ids).logits, rtol=1e-4, atol=2e-5)

    def test_loss_from_labels(self):
        dense, dsa = pair("llama", 64)
        ids = random_ids(2, 9)
        torch.testing.assert_close(dsa(ids, labels=ids).loss, dense(ids, labels=ids).loss)

    def test_hidden_states_of_generate(self):
        dense, dsa = pair("llama", 64)
        settings = {"output_hidden_states": True, "return_dict_in_generate": True, "do_sample": False}
        found = [
            model.generate(random_ids(1, 9), max_new_tokens=3, **settings).hidden_states
            for model in (dense, dsa)
        ]
        for theirs, ours in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)

    @pytest.mark.parametrize("assistant", ["dense", "dsa"])
    def test_an_assistant(self, assistant):
        """A dense model drafts for the converted one, and the other way round."""
        dense, dsa = pair("llama", 6)
        main, helper = (dsa, dense) if assistant == "dense" else (dense, dsa)
        settings = {"max_new_tokens": 8, "do_sample": False}
        expected = main.generate(random_ids(1, 20), **settings)
        assert torch.equal(main.generate(random_ids(1, 20), assistant_model=helper, **settings), expected)

    def test_dtype_and_device_map_at_load(self, saved):
        model = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.bfloat16, device_map="cpu")
        pairs = model.model.layers[0].self_attn.indexer.rope_pairs
        assert (model.dtype, pairs.dtype) == (torch.bfloat16, torch.int64)
        plain = AutoModelForCausalLM.from_pretrained(saved, dtype="bfloat16")
        assert torch.equal(model(random_ids(1, 9)).logits, plain(random_ids(1, 9)).logits)

    def test_masks_of_other_shapes_are_refused(self):
        _, dsa = pair("llama", 6)
        for mask in (torch.ones(1, 1, 9, 9), torch.ones(1, 8), {"full_attention": None}):
            with pytest.raises(ConfigError, match="attention_mask has shape"):
                dsa(random_ids(1, 9), attention_mask=mask)
