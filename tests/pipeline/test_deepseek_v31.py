"""DeepSeek-V3.1 to V3.2: block-FP8 shards layer by layer, and what comes out is as V3.2's own checkpoint."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, DeepseekV32ForCausalLM

import fulmen
from fulmen.modeling.model_shards import ModelShards
from fulmen.modeling.quantization.fp8 import fp8_blocks
from fulmen.modeling.weight_files import INDEX_FILE
from tests.modeling.mla.tiny_mla import make_mla, mla_ids
from tests.modeling.tiny_source import WEIGHTS, edit_json
from tests.pipeline.tiny_runs import tiny_tokenizer

BLOCK = (8, 16)
QUANTIZATION = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "scale_fmt": "ue8m0",
}
# What V3.1's config says and Transformers' classes do not know.
RAW = {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1, "ep_size": 1}
ASKED = {"topk": 8, "length": 64, "by_layers": True, "stages": "inherit"}
INDEXER = {
    "k_norm.bias": torch.float32,
    "k_norm.weight": torch.float32,
    "weights_proj.weight": torch.bfloat16,
    "wk.weight": torch.float8_e4m3fn,
    "wk.weight_scale_inv": torch.float32,
    "wq_b.weight": torch.float8_e4m3fn,
    "wq_b.weight_scale_inv": torch.float32,
}


def save_v31(folder, block=BLOCK, **shape):
    """One dense layer, two with experts, one that predicts further tokens; projections in FP8."""
    model = make_mla("v3", vocab_size=97, **shape).bfloat16()
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    held = {}
    for name, x in load_file(folder / WEIGHTS).items():
        if "layers" in name and x.ndim == 2 and "mlp.gate." not in name:
            held[name], held[f"{name}_scale_inv"] = fp8_blocks(x, block)
        else:
            held[name] = x
    last = {
        name.replace("layers.2.", "layers.3."): x.clone() for name, x in held.items() if "layers.2." in name
    }
    held |= last | {"model.layers.3.eh_proj.weight": torch.zeros(64, 128, dtype=torch.bfloat16)}
    save_file(held, folder / WEIGHTS, {"format": "pt"})
    quantization = {**QUANTIZATION, "weight_block_size": list(block)}
    added = {**RAW, "dtype": "bfloat16", "quantization_config": quantization, "num_nextn_predict_layers": 1}
    edit_json(folder / "config.json", **added)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_v31(tmp_path_factory.mktemp("v31") / "v31")


@pytest.fixture(scope="module")
def made(source, corpus_dir, tmp_path_factory):
    return fulmen.convert(source, out=tmp_path_factory.mktemp("v32") / "v32", data=corpus_dir, **ASKED)


def test_names_types_and_config_are_those_of_v32(made, source):
    assert (made.path / "model-dense.safetensors").samefile(source / WEIGHTS)
    indexers = load_file(made.path / "model-indexers.safetensors")
    wanted = {
        f"model.layers.{layer}.self_attn.indexer.{name}": kind
        for layer in range(3)
        for name, kind in INDEXER.items()
    }
    assert {name: x.dtype for name, x in indexers.items()} == wanted
    scales = [x for name, x in indexers.items() if name.endswith("scale_inv")]
    assert all(torch.equal(x.log2(), x.log2().round()) for x in scales)
    listed = json.loads((made.path / INDEX_FILE).read_text())["weight_map"]
    assert listed.keys() == load_file(source / WEIGHTS).keys() | indexers.keys()
    config = json.loads((made.path / "config.json").read_text())
    assert config["model_type"] == "deepseek_v32"
    assert config["architectures"] == ["DeepseekV32ForCausalLM"]
    assert config["quantization_config"] == {**QUANTIZATION, "weight_block_size": list(BLOCK)}
    assert config["index_topk"] == 8
    assert config["num_nextn_predict_layers"] == 1
    assert RAW.items() <= config.items()


def test_fits_the_stock_class_and_loads_there(made):
    config = AutoConfig.from_pretrained(made.path)
    with torch.device("meta"):
        stock = DeepseekV32ForCausalLM(config)
    shapes = ModelShards(made.path, config).shapes
    assert {name: tuple(x.shape) for name, x in stock.state_dict().items()}.items() <= shapes.items()
    (ours, _), theirs = fulmen.load(made), AutoModelForCausalLM.from_pretrained(made.path)
    same, other = ours.state_dict(), theirs.state_dict()
    assert same.keys() == other.keys()
    assert all(torch.equal(x.float(), other[name].float()) for name, x in same.items())
    ids = mla_ids(1, 40)
    with torch.no_grad():
        assert bool(ours(ids).logits.isfinite().all())


def test_indexers_are_those_of_the_whole_model(made, source, corpus_dir, tmp_path):
    """But for the rounding to FP8: a 16th of a number at most, if it is not tiny."""
    whole = fulmen.convert(source, out=tmp_path / "whole", data=corpus_dir, **{**ASKED, "by_layers": False})
    stage = load_file(made.path / "stages" / "inherit.safetensors")
    expected = load_file(whole.path / "stages" / "inherit.safetensors")
    assert stage.keys() == expected.keys()
    assert all(torch.equal(stage[name], x) for name, x in expected.items())
    (rounded, _) = fulmen.load(made)
    for name, x in expected.items():
        error = (rounded.state_dict()[name].float() - x.float()).abs()
        assert bool((error <= x.float().abs() / 16 + x.float().abs().max() * 2**-9).all()), name
