"""The server as a process, from its first moment to its end by signals; the engine is a small program."""

import os
import signal
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve: pip install 'fulmen[serve]'")

import httpx
from transformers import LlamaConfig

from fulmen.serving.billing.store import open_billing
from fulmen.serving.engine.served_model import ServedModel
from fulmen.serving.server import serve
from tests.fork_server import Forked
from tests.processes import WAIT_S, family_of, runs, until

# Answers /health when a file is there, and anything else by a stream without end.
ENGINE = """
import asyncio, json, pathlib, sys
USAGE = {"prompt_tokens": 3, "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": 0}}
CHUNK = {"choices": [{"index": 0, "delta": {"content": "a"}, "finish_reason": None}], "usage": USAGE}

async def answer(reader, writer):
    while head := await reader.readuntil(b"\\r\\n\\r\\n"):
        if b" /health " in head:
            status = b"200 OK" if pathlib.Path(sys.argv[2]).exists() else b"503 Not Yet"
            writer.write(b"HTTP/1.1 " + status + b"\\r\\ncontent-length: 0\\r\\n\\r\\n")
            continue
        writer.write(b"HTTP/1.1 200 OK\\r\\nconnection: close\\r\\n\\r\\n")
        while True:
            writer.write(b"data: " + json.dumps(CHUNK).encode() + b"\\n\\n")
            await writer.drain()
            await asyncio.sleep(0.02)

async def main():
    async with await asyncio.start_unix_server(answer, sys.argv[1]) as server:
        await server.serve_forever()

asyncio.run(main())
"""
ASKED = {"model": "m", "messages": [{"role": "user", "content": "?"}], "stream": True}


def run(state):
    """What the process does."""
    model = ServedModel(Path("m"), "m", LlamaConfig(num_hidden_layers=1), None, 2048, "", frozenset())
    settings = SimpleNamespace(
        model=model,
        key="k",
        context=2048,
        command=lambda socket: [sys.executable, "-c", ENGINE, str(socket), str(state / "is-ready")],
        environment=lambda folder: {},
    )

    @contextmanager
    def stage(title):
        (state / "stage").write_text(f"{title}: begun")
        yield
        (state / "stage").write_text(f"{title}: ended")

    say = partial(print, file=sys.stderr, flush=True)
    return serve(settings, open_billing(state), state, "127.0.0.1", 0, say, stage)


@contextmanager
def server(state):
    """Its process, what it says, its address, and all processes that belong to it."""
    code = f"import pathlib, sys; from {__name__} import run; sys.exit(run(pathlib.Path(sys.argv[1])))"
    readable, writable = os.pipe()
    process = Forked(code, state, stderr=writable)
    os.close(writable)
    with open(readable) as said:
        try:
            assert "starting vLLM" in said.readline()
            until(lambda: len(family_of(process.pid)) == 3)
            own, *below = family_of(process.pid)
            (listener,) = own.net_connections("tcp")
            yield process, said, f"http://127.0.0.1:{listener.laddr.port}", below
        finally:
            if process.returncode is None:
                os.kill(process.pid, signal.SIGKILL)
                process.wait(WAIT_S)


def test_before_the_engine_is_ready_clients_are_told_so_and_a_signal_ends_it_all(tmp_path):
    with server(tmp_path) as (process, said, url, family):
        for answer in (httpx.post(f"{url}/chat/completions", json=ASKED), httpx.get(f"{url}/health")):
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
            assert answer.json()["error"]["message"].startswith("the engine is starting")
        assert (tmp_path / "stage").read_text() == "Start vLLM: begun"
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(WAIT_S) == 128 + signal.SIGTERM
        assert said.read() == "stopped before it was ready\n"
        assert not any(map(runs, family))


def test_a_second_signal_ends_open_requests_and_charges_for_what_they_got(tmp_path):
    (tmp_path / "is-ready").touch()
    with server(tmp_path) as (process, said, url, family):
        assert "ready at" in said.readline()
        assert (tmp_path / "stage").read_text() == "Start vLLM: ended"
        with httpx.stream("POST", f"{url}/chat/completions", json=ASKED, timeout=WAIT_S) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("data: ")
            os.kill(process.pid, signal.SIGINT)
            assert "waiting for 1 open requests" in said.readline()
            assert next(line for line in lines if line).startswith("data: ")
            os.kill(process.pid, signal.SIGINT)
            assert '"error"' in [line for line in lines if line][-1]
        assert process.wait(WAIT_S) == 128 + signal.SIGINT
        assert said.read() == "stopped\n"
        assert not any(map(runs, family))
    (entry,) = open_billing(tmp_path).ledger.rows()
    assert (entry.state, entry.outcome, entry.output) == ("settled", "engine lost", 1)
