"""An MLA model becomes a stock deepseek_v32 model whose logits, with nothing left out, are the source's."""

import json

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DeepseekV32ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from fulmen.config import DsaConfig
from fulmen.errors import AlreadyConvertedError, ConfigError, UnsupportedModelError
from fulmen.modeling.checkpoint import load_dense
from fulmen.modeling.families import family_for
from fulmen.modeling.mla.convert import convert_mla
from fulmen.pipeline.model_config import read_config
from tests.modeling.mla.tiny_mla import make_mla, mla_ids
from tests.modeling.tiny_source import make_tokenizer

INDEX = {"topk": 64, "index_n_heads": 4, "index_head_dim": 16}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "mscale": 0.7,
    "mscale_all_dim": 0.7,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 64,
}
DENSE_V2 = {"first_k_dense_replace": 3, "n_group": None, "topk_group": None}


def logits_gap(source, converted) -> float:
    ids = mla_ids(2, 40)
    with torch.no_grad():
        expected = source(ids).logits
        assert expected.std() > 0.3
        return float((converted(ids).logits - expected).abs().max())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope_interleave": False},
        {"rope_interleave": False, "attention_bias": True},
        {"rope_parameters": YARN},
        {"norm_topk_prob": False, "routed_scaling_factor": 1.3},
        {"first_k_dense_replace": 0, "n_group": 1, "n_shared_experts": 2},
        {"tie_word_embeddings": True},
        {"attn": "eager"},
    ],
    ids=str,
)
def test_v3_logits_stay(changes):
    source = make_mla("v3", **changes)
    assert logits_gap(source, convert_mla(source, **INDEX)) < 1e-6


@pytest.mark.parametrize("changes", [{}, {"mlp_layer_types": ["dense"] * 2 + ["sparse"]}], ids=str)
def test_logits_of_glm_4_7_flash_stay(changes):
    source = make_mla("lite", **changes)
    converted = convert_mla(source, **INDEX)
    assert converted.config.first_k_dense_replace == source.config.mlp_layer_types.count("dense")
    assert logits_gap(source, converted) < 1e-6


def test_kimi_k2_is_read_as_deepseek_v3(tmp_path):
    """By the config that its checkpoints have; their `auto_map` names code that is not run."""
    source = make_mla("v3")
    source.save_pretrained(tmp_path)
    make_tokenizer(source.config.vocab_size).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    values |= {"model_type": "kimi_k2", "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    _, config = read_config(tmp_path)
    assert (type(config), config.model_type) == (DeepseekV3Config, "deepseek_v3")
    dense, _ = load_dense(tmp_path)
    assert logits_gap(source, convert_mla(dense, **INDEX)) < 1e-6


@pytest.mark.parametrize("changes", [{}, {"rope_parameters": YARN}], ids=str)
def test_v2_logits_stay(changes):
    source = make_mla("v2", **DENSE_V2, **changes)
    # V2 turns by complex numbers, V3.2 by cosines and sines: not the same rounding.
    assert logits_gap(source, convert_mla(source, **INDEX)) < 2e-5


@pytest.mark.parametrize(("kind", "changes"), [("v3", {"attention_bias": True}), ("v2", DENSE_V2)])
def test_a_source_without_query_rank_keeps_its_logits(kind, changes):
    source = make_mla(kind, q_lora_rank=None, **changes)
    converted = convert_mla(source, **INDEX)
    assert converted.config.q_lora_rank == source.config.hidden_size
    assert logits_gap(source, converted) < 5e-5


def test_query_rank_error_is_the_input_norms_epsilon():
    source = make_mla("v3", q_lora_rank=None)
    converted = convert_mla(source, **INDEX)
    attention, norm = converted.model.layers[0].self_attn, source.model.layers[0].input_layernorm
    for size in (1e-2, 1.0, 1e2):
        h = torch.randn(4, 64, generator=torch.Generator().manual_seed(1)) * size
        with torch.no_grad():
            x = norm(h)
            recovered = attention.q_a_layernorm(attention.q_a_proj(x))
        exact = (1 + norm.variance_epsilon / h.square().mean(-1, keepdim=True)).sqrt()
        torch.testing.assert_close(recovered, x * exact, rtol=1e-5, atol=1e-6)


def test_saved_model_loads_in_transformers_alone(tmp_path):
    source = make_mla("v3")
    convert_mla(source, **INDEX).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is DeepseekV32ForCausalLM
    assert logits_gap(source, loaded) < 1e-6


def test_source_is_left_as_it_is():
    source = make_mla("v3", rope_interleave=False)
    before = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    convert_mla(source, **INDEX)
    assert all(torch.equal(tensor, before[name]) for name, tensor in source.state_dict().items())


def test_half_precision_keeps_head_weights_in_fp32():
    converted = convert_mla(make_mla("v3").to(torch.bfloat16), **INDEX)
    indexer = converted.model.layers[0].self_attn.indexer
    assert indexer.weights_proj.weight.dtype == torch.float32
    assert indexer.wk.weight.dtype == converted.dtype == torch.bfloat16
    converted(mla_ids(1, 12))


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("v2", {}, r"first_k_dense_replace=1.*softmax.*sigmoid"),
        ("v2", {**DENSE_V2, "mlp_bias": True}, "mlp_bias=True"),
        ("lite", {"mlp_layer_types": ["dense", "sparse", "dense"]}, "mlp_layer_types=.*in the first layers"),
        ("lite", {"rope_parameters": {**YARN, "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ("v3", {"num_key_value_heads": 4}, "num_key_value_heads=4"),
        ("v3", {"n_group": None}, "n_group=None"),
    ],
)
def test_what_v32_cannot_express_is_refused(kind, changes, message):
    with pytest.raises(UnsupportedModelError, match=message):
        convert_mla(make_mla(kind, **changes), **INDEX)


def test_norm_weights_near_zero_are_refused():
    source = make_mla("v3", q_lora_rank=None)
    source.model.layers[1].input_layernorm.weight.data[3] = 0
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.input_layernorm.* 1 weights near zero"):
        convert_mla(source, **INDEX)


def test_other_models_and_settings_are_refused():
    with pytest.raises(AlreadyConvertedError, match="deepseek_v32"):
        convert_mla(make_mla("v32"), **INDEX)
    llama = LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=8, num_attention_heads=1, num_hidden_layers=1)
    )
    with pytest.raises(UnsupportedModelError, match="llama"):
        convert_mla(llama, **INDEX)
    source = make_mla("v3")
    for bad in ({"topk": 0}, {"index_n_heads": -1}, {"index_head_dim": 6}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            convert_mla(source, **{**INDEX, **bad})


def test_family_converts_all_layers_with_one_key_head():
    source = make_mla("v3")
    family = family_for(source.config)
    assert family.full_attention_layers(source.config) == [0, 1, 2]
    converted = family.from_dense(source, DsaConfig(64, 4, 1, 16, (0, 1, 2)))
    assert converted.config.model_type == family.dsa_types[0]
    with pytest.raises(ConfigError, match="index_n_kv_heads=2"):
        family.from_dense(source, DsaConfig(64, 4, 2, 16, (0, 1, 2)))
    with pytest.raises(ConfigError, match="layers"):
        family.from_dense(source, DsaConfig(64, 4, 1, 16, (0, 1)))
