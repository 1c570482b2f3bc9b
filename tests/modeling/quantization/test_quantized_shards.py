"""Quantized checkpoints: unpacked they are what was packed, and what the formats' libraries make of it."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from fulmen import CheckpointError
from fulmen.modeling.checkpoint import load_dense
from fulmen.modeling.config_checks import read_own_config
from fulmen.modeling.model_shards import ModelShards
from fulmen.modeling.quantization.fp8 import fp8_blocks
from tests.modeling.gqa.tiny_gqa import make_dense, random_ids
from tests.modeling.quantization.tiny_quantized import FORMATS, gptq, save_quantized, write_checkpoint
from tests.modeling.tiny_source import edit_weights

Q_PROJ = "model.layers.0.self_attn.q_proj"


def shards_of(folder):
    return ModelShards(folder, read_own_config(str(folder)))


@pytest.mark.parametrize("name", FORMATS)
def test_weights_are_those_that_were_packed(name, tmp_path):
    model = save_quantized(tmp_path, name)
    shards, expected = shards_of(tmp_path), model.state_dict()
    assert shards.shapes == {key: tuple(x.shape) for key, x in expected.items()}
    found = shards.tensors(expected)
    assert all(torch.equal(found[key], x) and found[key].dtype == x.dtype for key, x in expected.items())
    assert torch.equal(torch.cat(list(shards.blocks(f"{Q_PROJ}.weight"))), expected[f"{Q_PROJ}.weight"])


@pytest.mark.parametrize("name", ["fp8", "gptq"])
def test_loaded_whole_it_is_the_model_that_was_meant(name, tmp_path):
    expected = save_quantized(tmp_path, name)
    model, _ = load_dense(tmp_path)
    assert getattr(model.config, "quantization_config", None) is None
    ids = random_ids(1, 12)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected(ids).logits)


@pytest.mark.skipif(importlib.util.find_spec("compressed_tensors") is None, reason="needs compressed-tensors")
@pytest.mark.parametrize("name", ["w8a8", "fp8-rows", "w4a16", "w4a16-asymmetric"])
def test_compressed_tensors_unpacks_the_same(name, tmp_path):
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    save_quantized(tmp_path, name)
    shards, settings = shards_of(tmp_path), FORMATS[name][0]
    stored = super(ModelShards, shards).tensors([key for key in shards.held if key.startswith(Q_PROJ)])
    scheme = QuantizationScheme(**settings["config_groups"]["group_0"], format=settings["format"])
    parts = {key.rpartition(".")[2]: x for key, x in stored.items()}
    library = BaseCompressor.get_value_from_registry(settings["format"])
    unpacked = library.decompress(parts, scheme)["weight"]
    assert torch.equal(shards.tensors([f"{Q_PROJ}.weight"])[f"{Q_PROJ}.weight"], unpacked.bfloat16())


def test_transformers_unpacks_the_same_blocks(tmp_path):
    save_quantized(tmp_path, "fp8")
    shards, name = shards_of(tmp_path), f"{Q_PROJ}.weight"
    parts = super(ModelShards, shards).tensors([name, f"{name}_scale_inv"])
    expected = Fp8Dequantize(SimpleNamespace())._dequantize_one(*parts.values(), torch.bfloat16)
    assert torch.equal(shards.tensors([name])[name], expected)


def test_the_last_block_may_be_cut():
    """As in DeepSeek-V3, where 576 rows are four blocks and a half."""
    weight = torch.randn(72, 40, generator=torch.Generator().manual_seed(0))
    codes, scale = fp8_blocks(weight, (32, 16))
    assert codes.shape == (72, 40)
    assert scale.shape == (3, 3)
    error = (codes.float() * scale.repeat_interleave(32, 0)[:72].repeat_interleave(16, 1)[:, :40]) - weight
    # Three bits of mantissa: a 16th of a number at most, if it is not tiny.
    assert bool((error.abs() <= weight.abs() / 16 + scale.max() * 2**-9).all())


def test_gptq_in_the_order_of_activations(tmp_path):
    """`desc_act`: which group an input belongs to stands beside it."""
    save_quantized(tmp_path, "gptq")
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    parts, meant = gptq(weight)
    mixed = {**parts, "g_idx": parts["g_idx"][order]}
    codes = parts["qweight"].T.contiguous()
    digits = torch.stack([(codes >> shift) & 15 for shift in range(0, 32, 4)], -1).flatten(1)[:, order]
    packed = sum(digits.long().unflatten(1, (-1, 8))[..., place] << (4 * place) for place in range(8))
    mixed["qweight"] = (packed - ((packed >> 31) << 32)).int().T.contiguous()
    edit_weights(tmp_path, {f"{Q_PROJ}.{part}": x.contiguous() for part, x in mixed.items()})
    found = shards_of(tmp_path).tensors([f"{Q_PROJ}.weight"])[f"{Q_PROJ}.weight"]
    assert torch.equal(found, meant[:, order].bfloat16())


def test_experts_in_mxfp4(tmp_path):
    model = make_dense("gpt-oss", torch.bfloat16, intermediate_size=64, num_local_experts=2)
    held, expected = {}, {}
    draw = torch.Generator().manual_seed(0)
    for key, x in model.state_dict().items():
        if not key.endswith(("experts.gate_up_proj", "experts.down_proj")):
            held[key] = x
            continue
        experts, inputs, outputs = x.shape
        blocks = torch.randint(256, (experts, outputs, inputs // 32, 16), generator=draw, dtype=torch.uint8)
        scales = torch.randint(118, 124, (experts, outputs, inputs // 32), generator=draw, dtype=torch.uint8)
        held |= {f"{key}_blocks": blocks, f"{key}_scales": scales}
        expected[key] = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
    write_checkpoint(tmp_path, model, held, {"quant_method": "mxfp4"})
    found = shards_of(tmp_path).tensors(expected)
    assert all(torch.equal(found[key], x) for key, x in expected.items())
    assert load_dense(tmp_path)[0].config.model_type == "gpt_oss"


def test_numbers_that_are_none(tmp_path):
    save_quantized(tmp_path, "fp8")
    name = f"{Q_PROJ}.weight"
    codes = super(ModelShards, shards := shards_of(tmp_path)).tensors([name])[name].clone()
    shards.require_finite(shards.held)
    codes[3, 5] = torch.nan
    edit_weights(tmp_path, {name: codes})
    with pytest.raises(CheckpointError, match=f"NaN or infinite values in {name}"):
        shards_of(tmp_path).require_finite([name])
    with pytest.raises(CheckpointError, match=f"NaN or infinite values in {name}"):
        load_dense(tmp_path)
