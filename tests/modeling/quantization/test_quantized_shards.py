"""Quantized checkpoints: unpacked they are what was packed, and what the formats' own libraries make of it."""

import pytest
import torch

from fulmen.modeling.checkpoint import load_dense
from fulmen.modeling.config_checks import read_own_config
from fulmen.modeling.model_shards import ModelShards
from tests.modeling.gqa.tiny_gqa import random_ids
from tests.modeling.quantization.tiny_quantized import FORMATS, save_quantized


@pytest.mark.parametrize("name", FORMATS)
def test_weights_are_those_that_were_packed(name, tmp_path):
    model = save_quantized(tmp_path, name)
    shards = ModelShards(tmp_path, read_own_config(str(tmp_path)))
    expected = model.state_dict()
    assert shards.shapes == {key: tuple(x.shape) for key, x in expected.items()}
    found = shards.tensors(expected)
    assert all(found[key].dtype == torch.bfloat16 and torch.equal(found[key], x) for key, x in expected.items())


@pytest.mark.parametrize("name", FORMATS)
def test_loaded_whole_it_is_the_model_that_was_meant(name, tmp_path):
    expected = save_quantized(tmp_path, name)
    model, _ = load_dense(tmp_path)
    assert getattr(model.config, "quantization_config", None) is None
    ids = random_ids(1, 12)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected(ids).logits)
