"""GGUF files against the models that they were written from: weights, shape, RoPE."""

import math
import re

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from transformers import AutoModelForCausalLM

from fulmen import CheckpointError, UnsupportedModelError
from fulmen.modeling.checkpoint import load_dense, save_converted
from fulmen.modeling.gguf.config import GGUF_ARCHITECTURES, gguf_config
from fulmen.modeling.gguf.file import GgufModel, read_gguf
from fulmen.modeling.gguf.weights import load_gguf, read_sound_gguf
from tests.modeling.gguf.tiny_gguf import (
    ARCHITECTURES,
    make_source,
    shape_keys,
    tensors_of,
    tokenizer_keys,
    write_file,
    write_gguf,
)
from tests.modeling.gqa.tiny_gqa import LLAMA3_ROPE, VOCAB, make_dense, make_dsa, random_ids

LONG_IDS = random_ids(1, 300)
HALF = 8  # rotary pairs of the tiny heads
EMBEDDING_AND_QUERIES = ("token_embd.weight", "blk.0.attn_q.weight")


def logits(model, ids):
    with torch.no_grad():
        return model.eval()(ids).logits


def rope_of(path):
    return read_sound_gguf(path)[1].rope_parameters


def assert_equals_source(path, source, tolerance=1e-5):
    loaded, _ = load_gguf(path, torch.float32)
    assert torch.equal(loaded.model.embed_tokens.weight, source.model.embed_tokens.weight)
    difference = (logits(loaded, LONG_IDS) - logits(source, LONG_IDS)).abs().max()
    assert difference < tolerance * logits(source, LONG_IDS).std(), difference
    return loaded


def assert_gguf_refused(path, error, *words):
    """With the same line whether the header is read alone or all of it."""
    messages = []
    for read in (read_sound_gguf, load_gguf):
        with pytest.raises(error) as info:
            read(path)
        messages.append(str(info.value))
    assert messages[0] == messages[1]
    assert "\n" not in messages[0]
    assert all(word in messages[0] for word in (path.name, *words)), messages[0]


class TestWeights:
    @pytest.mark.parametrize("name", GGUF_ARCHITECTURES)
    @pytest.mark.parametrize("tied", [False, True])
    def test_every_architecture(self, name, tied, tmp_path):
        source = make_source(name, tie_word_embeddings=tied)
        loaded = assert_equals_source(write_gguf(tmp_path / "m.gguf", source), source)
        assert loaded.config.tie_word_embeddings is tied
        assert ARCHITECTURES.get(loaded.config.model_type, loaded.config.model_type) == name
        assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied

    def test_mistral_as_llama(self, tmp_path):
        source = make_dense("mistral")
        path = write_gguf(tmp_path / "m.gguf", source, "llama", keys={"general.name": "mistral"})
        assert_equals_source(path, source)

    @pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
    def test_heads_of_another_width(self, name, tmp_path):
        """qwen3 with heads of 24 is no 128; without the key the queries' rows say it."""
        source = make_dense(name, **({} if name == "qwen2" else {"head_dim": 24}))
        assert_equals_source(write_gguf(tmp_path / "m.gguf", source), source)
        unsaid = {f"{name}.attention.key_length": None, f"{name}.attention.value_length": None}
        loaded = assert_equals_source(write_gguf(tmp_path / "n.gguf", source, keys=unsaid), source)
        assert loaded.model.layers[0].self_attn.head_dim == (16 if name == "qwen2" else 24)

    @pytest.mark.parametrize(
        ("name", "projections"),
        [
            ("llama", ("attn_q", "attn_k", "attn_v")),
            ("llama", ("attn_output",)),
            ("llama", ("ffn_down", "ffn_up", "ffn_gate")),
            ("llama", ("ffn_down",)),
            ("qwen3", ("attn_q", "attn_k", "attn_v")),
        ],
    )
    def test_biases_that_a_family_may_have(self, name, projections, tmp_path):
        source = make_dense(name, attention_bias="attn" in projections[0], **mlp_bias(projections))
        gone = {}
        for stored in tensors_of(source, name):
            if stored.endswith(".bias") and stored.split(".")[-2] not in projections:
                gone[stored] = None
        with torch.no_grad():
            for part, weight in source.named_parameters():
                if part.endswith("bias") and hf_name(part) not in projections:
                    weight.zero_()
        assert_equals_source(write_gguf(tmp_path / "m.gguf", source, tensors=gone), source)

    @pytest.mark.parametrize(
        ("name", "stored", "shape"),
        [
            ("qwen2", "blk.1.attn_output.bias", (64,)),
            ("qwen3", "blk.1.attn_output.bias", (64,)),
            ("llama", "output.bias", (VOCAB,)),
            ("llama", "blk.0.attn_sinks.weight", (4,)),
            ("llama", "blk.0.attn_q_norm.weight", (16,)),
            ("llama", "blk.2.attn_qkv.weight", (128, 64)),
            ("llama", "blk.3.attn_q.weight", (64, 64)),
            ("llama", "blk.0.ffn_gate_exps.weight", (2, 96, 64)),
            ("llama", "blk.0.attn_q.weight.lora_a", (4, 64)),
            ("qwen2", "cls.output.weight", (2, 64)),
        ],
    )
    def test_a_tensor_without_a_place_is_named(self, name, stored, shape, tmp_path):
        path = write_gguf(tmp_path / "m.gguf", make_dense(name), tensors={stored: torch.zeros(shape)})
        assert_gguf_refused(path, UnsupportedModelError, f"has no place for, the first {stored}")

    @pytest.mark.parametrize(
        "stored",
        [
            "token_embd.weight",
            "output_norm.weight",
            "blk.0.attn_q.weight",
            "blk.2.ffn_up.weight",
            "blk.1.attn_k.bias",
        ],
    )
    def test_a_missing_tensor_is_named(self, stored, tmp_path):
        path = write_gguf(tmp_path / "m.gguf", make_dense("qwen2"), tensors={stored: None})
        assert_gguf_refused(path, CheckpointError, f"lacks {stored}")

    def test_a_bias_that_one_layer_lacks_is_not_made_up(self, tmp_path):
        source = make_dense("llama", attention_bias=True)
        path = write_gguf(tmp_path / "m.gguf", source, tensors={"blk.1.attn_k.bias": None})
        assert_gguf_refused(path, CheckpointError, "lacks blk.1.attn_k.bias")

    def test_shapes_that_contradict_the_header(self, tmp_path):
        other = {"blk.1.attn_v.weight": torch.zeros(48, 64)}
        path = write_gguf(tmp_path / "m.gguf", make_dense(), tensors=other)
        assert_gguf_refused(path, CheckpointError, "blk.1.attn_v.weight of the shape [48, 64]", "[32, 64]")

    def test_more_tokens_than_embeddings(self, tmp_path):
        small = {"token_embd.weight": torch.zeros(VOCAB - 1, 64), "output.weight": torch.zeros(VOCAB - 1, 64)}
        path = write_gguf(tmp_path / "m.gguf", make_dense(), tensors=small)
        assert_gguf_refused(path, CheckpointError, f"{VOCAB - 1} embeddings", f"{VOCAB} tokens")

    @pytest.mark.parametrize(
        "type_", [Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1]
    )
    def test_types(self, type_, tmp_path):
        source = make_dense()
        path = write_gguf(tmp_path / "m.gguf", source, matrices=type_)
        loaded, _ = load_dense(path)
        own = {Type.F32: torch.float32, Type.F16: torch.float16}.get(type_, torch.bfloat16)
        assert loaded.dtype == loaded.config.dtype == read_sound_gguf(path)[1].dtype == own
        assert load_dense(path, torch.float32)[0].dtype == torch.float32
        weight = source.model.layers[1].mlp.down_proj.weight.detach().numpy()
        expected = torch.from_numpy(gguf.dequantize(gguf.quantize(weight, type_), type_)).to(own)
        assert torch.equal(loaded.model.layers[1].mlp.down_proj.weight, expected)

    def test_a_large_tensor_is_read_in_several_pieces(self, tmp_path, monkeypatch):
        source = make_dense("qwen3")
        path = write_gguf(tmp_path / "m.gguf", source, matrices=Type.Q8_0)
        whole = logits(load_gguf(path)[0], LONG_IDS)
        monkeypatch.setattr("fulmen.modeling.gguf.file._CHUNK", 7 * 64)
        assert torch.equal(logits(load_gguf(path)[0], LONG_IDS), whole)

    def test_the_header_is_read_without_the_tensors(self, tmp_path, monkeypatch):
        path = write_gguf(tmp_path / "m.gguf", make_dense())
        monkeypatch.setattr("fulmen.modeling.gguf.file.GgufTensor.load", None)
        assert read_sound_gguf(path)[1].hidden_size == 64

    def test_values_that_are_not_finite(self, tmp_path):
        bad = tensors_of(make_dense(), "llama")["blk.1.ffn_up.weight"].clone()
        bad[3, 4] = math.nan
        path = write_gguf(tmp_path / "m.gguf", make_dense(), tensors={"blk.1.ffn_up.weight": bad})
        with pytest.raises(
            CheckpointError, match=r"NaN or infinite values in model\.layers\.1\.mlp\.up_proj"
        ):
            load_dense(path)


def mlp_bias(projections):
    return {"mlp_bias": True} if "ffn" in projections[0] else {}


def hf_name(part):
    names = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output"}
    kind = re.search(r"(\w+)_proj", part)[1]
    return names.get(kind, f"ffn_{kind}")


def frequency_factors(source):
    """What the converter stores: by how much each pair turns more slowly than without scaling."""
    theta = source.config.rope_parameters["rope_theta"]
    plain = theta ** -(torch.arange(HALF) / HALF)
    return plain / source.model.rotary_emb.inv_freq


def odd_factors():
    return 1 + torch.rand(HALF, generator=torch.Generator().manual_seed(3)) * 5


class TestRope:
    @pytest.mark.parametrize(
        "changes",
        [{}, {"factor": 32.0, "original_max_position_embeddings": 128}, {"rope_theta": 5e5, "factor": 8.0}],
    )
    def test_llama3(self, changes, tmp_path):
        source = make_dense("llama", rope_parameters={**LLAMA3_ROPE, **changes})
        path = write_gguf(
            tmp_path / "m.gguf", source, tensors={"rope_freqs.weight": frequency_factors(source)}
        )
        loaded = assert_equals_source(path, source)
        rope = loaded.config.rope_parameters
        assert rope["rope_type"] == "llama3"
        assert rope["factor"] == source.config.rope_parameters["factor"]
        ours, theirs = loaded.model.rotary_emb.inv_freq, source.model.rotary_emb.inv_freq
        assert torch.allclose(ours, theirs, rtol=1e-5)

    def test_llama_31s_own(self, tmp_path):
        """128-wide heads leave but one setting that fits."""
        rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0}
        rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
        source = make_dense("llama", head_dim=128, max_position_embeddings=131072, rope_parameters=dict(rope))
        plain = 5e5 ** -(torch.arange(64) / 64)
        factors = plain / source.model.rotary_emb.inv_freq
        path = write_gguf(tmp_path / "m.gguf", source, tensors={"rope_freqs.weight": factors})
        assert rope_of(path) == rope

    @pytest.mark.parametrize("name", ["llama", "qwen2"])
    def test_any_factors(self, name, tmp_path):
        """No formula gives them: they are kept one by one, below and above the context's length alike."""
        factors = odd_factors()
        both = {"short_factor": factors.tolist(), "long_factor": factors.tolist()}
        rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 200, **both}
        source = make_dense(name, max_position_embeddings=200, rope_parameters=rope)
        path = write_gguf(tmp_path / "m.gguf", source, tensors={"rope_freqs.weight": factors})
        assert_equals_source(path, source)

    @pytest.mark.parametrize("key", ["rope.scaling.factor", "rope.scale_linear"])
    @pytest.mark.parametrize("type_", [None, "linear"])
    def test_linear(self, key, type_, tmp_path):
        rope = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
        source = make_dense("qwen3", head_dim=16, rope_parameters=rope)
        keys = {f"qwen3.{key}": 4.0, "qwen3.rope.scaling.type": type_}
        assert_equals_source(write_gguf(tmp_path / "m.gguf", source, keys=keys), source)

    def test_none_is_none_whatever_the_factor(self, tmp_path):
        keys = {"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}
        assert_equals_source(write_gguf(tmp_path / "m.gguf", make_dense(), keys=keys), make_dense())

    def test_linear_over_factors_per_pair(self, tmp_path):
        factors = odd_factors()
        tensors = {"rope_freqs.weight": factors}
        keys = {"llama.rope.scaling.factor": 2.0}
        rope = rope_of(write_gguf(tmp_path / "m.gguf", make_dense(), keys=keys, tensors=tensors))
        assert rope["short_factor"] == rope["long_factor"] == pytest.approx((2 * factors).tolist())

    @pytest.mark.parametrize(
        "extra", [{}, {"beta_fast": 16.0, "beta_slow": 2.0}, {"attention_factor": 1.3}, {"factor": 1.5}]
    )
    def test_yarn(self, extra, tmp_path):
        rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, **extra}
        source = make_dense("qwen2", rope_parameters={**rope, "rope_theta": 1e4})
        names = {"beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow"}
        names |= {"attention_factor": "yarn_attn_factor", "rope_type": "type"}
        names |= {"original_max_position_embeddings": "original_context_length"}
        keys = {f"qwen2.rope.scaling.{names.get(name, name)}": value for name, value in rope.items()}
        loaded = assert_equals_source(write_gguf(tmp_path / "m.gguf", source, keys=keys), source)
        assert loaded.config.rope_parameters == {**rope, "rope_theta": 1e4}

    def test_yarn_with_llama_cpps_own_factor_on_top(self, tmp_path):
        keys = {"qwen2.rope.scaling.type": "yarn", "qwen2.rope.scaling.factor": 4.0}
        keys |= {"qwen2.rope.scaling.original_context_length": 64, "qwen2.rope.scaling.attn_factor": 0.5}
        rope = rope_of(write_gguf(tmp_path / "m.gguf", make_dense("qwen2"), keys=keys))
        assert rope["attention_factor"] == pytest.approx(0.5 * (1 + 0.1 * math.log(4)))

    @pytest.mark.parametrize("attention_factor", [1.0, 1.25])
    @pytest.mark.parametrize("type_", [None, "longrope"])
    def test_longrope(self, attention_factor, type_, tmp_path):
        short, long = odd_factors(), odd_factors() * 3
        rope = {"rope_type": "longrope", "short_factor": short.tolist(), "long_factor": long.tolist()}
        rope |= {"original_max_position_embeddings": 128, "attention_factor": attention_factor}
        rope |= {"rope_theta": 1e4}
        source = make_dense("llama", rope_parameters=rope)
        tensors = {"rope_factors_short.weight": short, "rope_factors_long.weight": long}
        keys = {"llama.rope.scaling.attn_factor": attention_factor, "llama.rope.scaling.type": type_}
        keys["llama.rope.scaling.original_context_length"] = 128
        path = write_gguf(tmp_path / "m.gguf", source, keys=keys, tensors=tensors)
        loaded = assert_equals_source(path, source)
        short_ids = LONG_IDS[:, :100]
        assert torch.allclose(logits(loaded, short_ids), logits(source, short_ids), atol=1e-4)

    @pytest.mark.parametrize(
        ("keys", "tensors", "words"),
        [
            ({"rope.dimension_count": 8}, {}, ("RoPE on 8 of a head's 16 dims",)),
            ({"rope.scaling.type": "ntk"}, {}, ("scaling 'ntk'",)),
            ({"rope.scaling.attn_factor": 1.5}, {}, ("attn_factor=1.5",)),
            ({"rope.scaling.yarn_ext_factor": 1.0}, {}, ("yarn_ext_factor=1",)),
            (
                {"rope.scaling.type": "yarn", "rope.scaling.yarn_ext_factor": 0.5},
                {},
                ("yarn_ext_factor=0.5",),
            ),
            (
                {"rope.scaling.type": "yarn"},
                {"rope_freqs.weight": odd_factors()},
                ("together with rope_freqs",),
            ),
            ({"rope.scaling.yarn_log_multiplier": 0.1}, {}, ("yarn_log_multiplier=0.1",)),
            ({"rope.scaling.alpha": 1000.0}, {}, ("rope.scaling.alpha=1000.0",)),
        ],
    )
    def test_what_cannot_be_expressed_is_refused(self, keys, tensors, words, tmp_path):
        named = {f"llama.{key}": value for key, value in keys.items()}
        path = write_gguf(tmp_path / "m.gguf", make_dense(), keys=named, tensors=tensors)
        assert_gguf_refused(path, UnsupportedModelError, *words)

    @pytest.mark.parametrize(
        ("keys", "tensors", "words"),
        [
            ({}, {"rope_freqs.weight": torch.ones(7)}, ("7 values in rope_freqs.weight, not 8",)),
            ({}, {"rope_freqs.weight": torch.zeros(8)}, ("rope_freqs.weight, not 8 above 0",)),
            ({}, {"rope_factors_long.weight": torch.ones(8)}, ("rope_factors_short",)),
            ({"rope.scaling.type": "longrope"}, {}, ("rope_factors_short",)),
            ({"rope.scaling.factor": -2.0}, {}, ("scales RoPE by -2",)),
        ],
    )
    def test_factors_that_cannot_be(self, keys, tensors, words, tmp_path):
        named = {f"llama.{key}": value for key, value in keys.items()}
        path = write_gguf(tmp_path / "m.gguf", make_dense(), keys=named, tensors=tensors)
        assert_gguf_refused(path, CheckpointError, *words)

    @pytest.mark.parametrize("factors", [None, odd_factors()])
    def test_the_converted_model_keeps_the_frequencies(self, factors, tmp_path):
        source = make_dense("llama", rope_parameters=dict(LLAMA3_ROPE))
        stored = frequency_factors(source) if factors is None else factors
        dense, tokenizer = load_gguf(
            write_gguf(tmp_path / "m.gguf", source, tensors={"rope_freqs.weight": stored})
        )
        folder = save_converted(make_dsa(dense), tokenizer, tmp_path / "out", "# A tiny model\n")
        again = AutoModelForCausalLM.from_pretrained(folder)
        assert again.config.rope_parameters == dense.config.rope_parameters
        assert torch.equal(again.model.rotary_emb.inv_freq, dense.model.rotary_emb.inv_freq)
        expected = 1e4 ** -(torch.arange(HALF) / HALF) / stored
        assert torch.allclose(again.model.rotary_emb.inv_freq, expected, rtol=1e-5)


class TestShape:
    def test_values_of_every_layer_that_are_alike(self, tmp_path):
        source = make_dense("qwen3")
        keys = {"qwen3.feed_forward_length": [96] * 3, "qwen3.attention.head_count": [4] * 3}
        keys |= {"qwen3.attention.head_count_kv": [2] * 3}
        assert_equals_source(write_gguf(tmp_path / "m.gguf", source, keys=keys), source)

    @pytest.mark.parametrize(
        "key", ["feed_forward_length", "attention.head_count", "attention.head_count_kv"]
    )
    def test_layers_that_differ(self, key, tmp_path):
        path = write_gguf(tmp_path / "m.gguf", make_dense(), keys={f"llama.{key}": [4, 2, 4]})
        assert_gguf_refused(path, UnsupportedModelError, f"llama.{key} of 2 to 4 by layer")

    @pytest.mark.parametrize(
        "key", ["context_length", "block_count", "attention.head_count", "attention.layer_norm_rms_epsilon"]
    )
    def test_a_missing_key_is_named(self, key, tmp_path):
        path = write_gguf(tmp_path / "m.gguf", make_dense(), keys={f"llama.{key}": None})
        assert_gguf_refused(path, CheckpointError, f"lacks llama.{key}")

    @pytest.mark.parametrize(("key", "value"), [("block_count", "three"), ("attention.head_count", 0)])
    def test_a_value_that_cannot_be(self, key, value, tmp_path):
        path = write_gguf(tmp_path / "m.gguf", make_dense(), keys={f"llama.{key}": value})
        assert_gguf_refused(path, CheckpointError, f"llama.{key}={value!r}")

    def test_absent_keys_are_llama_cpps_defaults(self, tmp_path):
        source = make_dense("qwen3", num_key_value_heads=4)
        absent = {"qwen3.attention.head_count_kv": None, "qwen3.rope.freq_base": None}
        assert_equals_source(write_gguf(tmp_path / "m.gguf", source, keys=absent), source)

    def test_epsilon_is_the_one_that_was_meant(self, tmp_path):
        """1e-05 as float32 is 9.999999747378752e-06."""
        source = make_dense("llama", rms_norm_eps=1e-5)
        config = read_sound_gguf(write_gguf(tmp_path / "m.gguf", source))[1]
        assert config.rms_norm_eps == 1e-5
        assert "9.99" not in str(shape_keys(source, "llama"))

    @pytest.mark.parametrize("architecture", ["gemma2", "deepseek2", "mistral3", "phi3", "mamba"])
    def test_another_architecture(self, architecture, tmp_path):
        path = write_file(tmp_path / "m.gguf", architecture, {}, {"token_embd.weight": torch.zeros(4, 32)})
        with pytest.raises(UnsupportedModelError, match=f"'{architecture}'"):
            read_sound_gguf(path)

    def test_no_language_model(self, tmp_path):
        for type_ in ("adapter", "mmproj"):
            path = write_gguf(tmp_path / "m.gguf", make_dense(), keys={"general.type": type_})
            assert_gguf_refused(path, UnsupportedModelError, f"general.type='{type_}'")


class TestGemma3:
    def test_what_a_file_leaves_out(self, tmp_path):
        """llama.cpp's converter writes the window alone; every sixth layer sees all."""
        theta = {"rope_type": "default", "rope_theta": 1e6}
        rope = {"full_attention": theta, "sliding_attention": {**theta, "rope_theta": 1e4}}
        kinds = [*["sliding_attention"] * 5, "full_attention", "sliding_attention"]
        source = make_source("gemma3", num_hidden_layers=7, layer_types=kinds, rope_parameters=rope)
        unsaid = ("attention.sliding_window_pattern", "rope.freq_base_swa")
        keys = {f"gemma3.{key}": None for key in unsaid}
        loaded = assert_equals_source(write_gguf(tmp_path / "m.gguf", source, keys=keys), source)
        assert loaded.config.layer_types == kinds
        assert loaded.config.rope_parameters == rope

    @pytest.mark.parametrize("type_", [None, "linear"])
    def test_scaling_is_the_full_layers_alone(self, type_, tmp_path):
        source = make_source("gemma3", rope_parameters=make_dense("gemma3").config.rope_parameters)
        assert source.config.rope_parameters["full_attention"]["factor"] == 2
        keys = {"gemma3.rope.scaling.type": type_}
        loaded = assert_equals_source(write_gguf(tmp_path / "m.gguf", source, keys=keys), source)
        assert loaded.config.rope_parameters == source.config.rope_parameters

    @pytest.mark.parametrize(
        ("keys", "sliding"),
        [
            ({"attention.sliding_window_pattern": 3}, [0, 1]),
            ({"attention.sliding_window_pattern": 1}, []),
            ({"attention.sliding_window_pattern": 0}, [0, 1, 2]),
            ({"attention.sliding_window": 0, "attention.sliding_window_pattern": 3}, []),
            ({"attention.sliding_window": None}, []),
        ],
    )
    def test_windows(self, keys, sliding, tmp_path):
        named = {f"gemma3.{key}": value for key, value in keys.items()}
        config = read_sound_gguf(write_gguf(tmp_path / "m.gguf", make_source("gemma3"), keys=named))[1]
        assert [i for i, kind in enumerate(config.layer_types) if kind == "sliding_attention"] == sliding

    def test_a_pattern_of_another_length(self, tmp_path):
        keys = {"gemma3.attention.sliding_window_pattern": [True, False]}
        path = write_gguf(tmp_path / "m.gguf", make_source("gemma3"), keys=keys)
        assert_gguf_refused(path, CheckpointError, "sliding_window_pattern of 2 values for 3 layers")

    @pytest.mark.parametrize(("layers", "expected"), [(26, 24), (62, 16)])
    def test_the_logits_scale(self, layers, expected, tmp_path):
        """By the width of a head, in the 27B model by the hidden size a head; one weight tells the width."""
        source = make_source("gemma3")
        keys = {**shape_keys(source, "gemma3"), **tokenizer_keys(), "gemma3.block_count": layers}
        keys |= {"gemma3.attention.sliding_window_pattern": 6, "gemma3.attention.scale": expected**-0.5}
        tensors = {name: tensors_of(source, "gemma3")[name] for name in EMBEDDING_AND_QUERIES}
        header = read_gguf(write_file(tmp_path / "m.gguf", "gemma3", keys, tensors))
        assert gguf_config(header).query_pre_attn_scalar == expected
        wrong = {**header.metadata, "gemma3.attention.scale": 0.5}
        with pytest.raises(UnsupportedModelError, match=r"attention\.scale=0\.5"):
            gguf_config(GgufModel(header.path, wrong, header.tensors))

    def test_norms_keep_all_their_digits(self, tmp_path):
        """1 + weight has fewer digits in bfloat16 than weight: the 1 is taken off first."""
        source = make_source("gemma3")
        path = write_gguf(tmp_path / "m.gguf", source, matrices=Type.Q8_0)
        loaded, _ = load_gguf(path)
        stored = source.model.norm.weight.detach() + 1
        assert loaded.dtype == torch.bfloat16
        assert torch.equal(loaded.model.norm.weight, (stored - 1).bfloat16())
        assert not torch.equal(loaded.model.norm.weight, stored.bfloat16() - 1)
