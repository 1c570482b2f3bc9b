"""`fulmen serve` with a tiny random model and the real tokenizer, as a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import fulmen
from fulmen.modeling.checkpoint import find_source

ALICE, BOB, EVE, ONE = (f"sk-{name}-0123456789abcdef" for name in ("alice", "bob", "eve", "one"))
VOCABULARY = 49152


def save_model(folder):
    """A dense Llama that never ends by itself; None without the package that has the tokenizer."""
    source = find_source("smollm2-135m")
    if not source.gguf_file:
        return None
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": VOCABULARY}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 2048}
    LlamaForCausalLM(LlamaConfig(**shape, **heads)).to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source.place, gguf_file=source.gguf_file).save_pretrained(folder)
    return folder


def start(model, state):
    """Start the server on a free port; return its process and the lines it printed until it was ready."""
    keys = f"alice:{ALICE},bob:{BOB},eve:{EVE}"
    chosen = {"PYTHONPATH": str(Path(fulmen.__file__).parents[1]), "FULMEN_API_KEYS": keys}
    process = subprocess.Popen(
        [sys.executable, "-m", "fulmen.cli.main", "serve", str(model), "--port", "0", "--state", str(state)],
        env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", **chosen},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "ready at " in line:
            return process, lines
    raise AssertionError("".join(lines))


def engine_of(process):
    """The first process of the engine behind a server."""
    children = psutil.Process(process.pid).children()
    return next(child for child in children if any("api_server" in part for part in child.cmdline()))


def engine_url(process):
    """Where that engine listens."""
    command = engine_of(process).cmdline()
    return f"http://127.0.0.1:{command[command.index('--port') + 1]}"
