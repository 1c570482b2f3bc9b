"""However 16-bit weights come into memory, a CPU without instructions for them multiplies in float32."""

from pathlib import Path

import pytest
import torch

from fulmen.modeling.by_layers import layered_model
from fulmen.modeling.checkpoint import load_dense, load_directory_model
from fulmen.modeling.config_checks import read_own_config
from fulmen.modeling.index_shape import default_dsa
from fulmen.modeling.model_shards import ModelShards
from fulmen.ops import half_products
from fulmen.pipeline.model_source import dense_source
from fulmen.pipeline.settings import ModelInMemory
from fulmen.training.run import training_arguments
from tests.modeling.gqa.tiny_gqa import make_dense, make_dsa
from tests.modeling.tiny_source import make_tokenizer, save_source

CPU = torch.device("cpu")


@pytest.fixture
def put(monkeypatch):
    """True for each time that torch's products would have been replaced."""
    found = []
    monkeypatch.setattr(half_products, "has_half_products", lambda dtype: dtype not in half_products.HALF)
    monkeypatch.setattr(half_products, "_put_before_torch", lambda: found.append(True))
    return found


def read_by_layers(folder: Path) -> None:
    config = read_own_config(str(folder))
    layered_model(config, default_dsa(config, 8), ModelShards(folder, config), CPU)


WAYS = {
    "dense": load_dense,
    "directory": load_directory_model,
    "by-layers": read_by_layers,
    "in-memory": lambda folder: dense_source(ModelInMemory(load_dense(folder)[0], make_tokenizer())),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_of_a_model(way, dtype, put, tmp_path):
    WAYS[way](save_source(tmp_path, make_dense("llama", dtype)))
    assert bool(put) == (dtype != torch.float32)


def test_of_a_converted_model(put, tmp_path):
    make_dsa(make_dense("llama", torch.bfloat16), topk=8).save_pretrained(tmp_path)
    load_directory_model(tmp_path)
    assert put


def test_of_a_quantized_gguf_file(put):
    load_dense("smollm2-135m")
    assert put


@pytest.mark.parametrize("bf16", [False, True])
def test_of_training_under_autocast(bf16, put, tmp_path):
    training_arguments(tmp_path, 1, 1, 0, CPU, bf16=bf16)
    assert bool(put) == bf16
