"""`fulmen serve` with a tiny random model and the real tokenizer, as a process of its own."""

import http.client
import json
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import closing, contextmanager
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace

import httpx
import openai
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fulmen
from fulmen.modeling.checkpoint import find_source, load_tokenizer
from fulmen.serving.billing.accounts import Accounts
from fulmen.serving.billing.store import open_billing
from tests.processes import WAIT_S, command_of, family_of, until

ALICE, BOB, EVE = (f"sk-{name}-0123456789abcdef" for name in ("alice", "bob", "eve"))
# SmolLM2's tokens, and room for those to fill in the middle, which it lacks.
VOCABULARY = 49280
FIM = ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"]
DEPOSIT = Decimal(5)
QUESTION = [{"role": "user", "content": "Who are you?"}]
# So long that no answer ends before a test has left, refused or killed: about 1 ms a token.
CONTEXT = 16384


def save_model(folder):
    """A dense Llama that never ends by itself; None without the package that has the tokenizer."""
    source = find_source("smollm2-135m")
    if not source.gguf_file:
        return None
    torch.manual_seed(0)
    # As slow as a small real model: vLLM's server must keep up with its engine to hear of an abort.
    shape = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 12, "vocab_size": VOCABULARY}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": CONTEXT}
    LlamaForCausalLM(LlamaConfig(**shape, **heads)).to(torch.bfloat16).save_pretrained(folder)
    tokenizer = load_tokenizer(source)
    tokenizer.add_special_tokens({"additional_special_tokens": FIM})
    tokenizer.save_pretrained(folder)
    return folder


@contextmanager
def state_folder():
    """A folder in memory where there is one: a disk that stalls would decide what a test gets to see."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder)


def start(model, state, *options):
    """Start the server on a free port; return its process and the lines it printed until it was ready."""
    keys = f"alice:{ALICE},bob:{BOB},eve:{EVE}"
    chosen = {"PYTHONPATH": str(Path(fulmen.__file__).parents[1]), "FULMEN_API_KEYS": keys}
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "fulmen.cli.main",
            "serve",
            str(model),
            "--port",
            "0",
            "--state",
            str(state),
            *options,
        ],
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


def serving(model, state):
    """A server with four accounts: address, books, folders and process; in the end it stops in good order."""
    one = Accounts(state).issue("one", 1)
    books = open_billing(state)
    books.ledger.deposit("alice", DEPOSIT, "test")
    books.ledger.deposit("eve", Decimal(0), "test")
    process, lines = start(model, state)
    server = SimpleNamespace(
        url=lines[-1].split()[-1],
        ledger=books.ledger,
        books=books,
        state=state,
        model=model,
        lines=lines,
        one=one,
        process=process,
    )
    yield server
    server.process.send_signal(signal.SIGINT)
    rest, _ = server.process.communicate(timeout=WAIT_S)
    assert server.process.returncode == 0
    assert rest.splitlines()[-1] == "stopped"
    printed = "".join(server.lines) + rest + (state / "engine.log").read_text()
    assert not any(key in printed for key in (ALICE, BOB, EVE, one))


def engine_of(process):
    """The first process of the engine behind a server, below the one that keeps it."""
    words = ["-m", "vllm.entrypoints.openai.api_server"]
    return next(one for one in family_of(process.pid) if command_of(one)[1:3] == words)


def engine_socket(process):
    """Where that engine listens."""
    command = engine_of(process).cmdline()
    return command[command.index("--uds") + 1]


def client(server, key=ALICE, path="/v1"):
    return openai.OpenAI(base_url=server.url + path, api_key=key, max_retries=0, timeout=WAIT_S)


def ask(server, key=ALICE, path="/v1", **fields):
    return client(server, key, path).chat.completions.create(
        **{"model": "tiny", "messages": QUESTION, "max_tokens": 4, **fields}
    )


def row(server, request_id):
    (found,) = [row for row in server.ledger.rows() if row.request_id == request_id]
    return found


def settled(server, request_id):
    until(lambda: row(server, request_id).state == "settled")
    return row(server, request_id)


def leave(server, path, body):
    """Ask, and leave when the engine has made a token; returns the request's id in the ledger."""
    before, tokens = {entry.request_id for entry in server.ledger.rows()}, tokens_made(server)
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=WAIT_S)
    headers = {"authorization": f"Bearer {ALICE}", "content-type": "application/json"}
    connection.request("POST", path, json.dumps(body), headers)
    with closing(connection):
        until(lambda: tokens_made(server) > tokens)
        (made,) = until(lambda: {entry.request_id for entry in server.ledger.rows()} - before)
    return made


def tokens_made(server):
    """How many the engine counts."""
    return sum(engine_figures(server, "vllm:generation_tokens_total"))


def engine_figures(server, name):
    """The engine's figures of names that begin so."""
    with httpx.Client(transport=httpx.HTTPTransport(uds=engine_socket(server.process))) as engine:
        lines = engine.get("http://engine/metrics").text.splitlines()
    return [float(line.split()[-1]) for line in lines if line.startswith(name)]
