"""One request between ledger and engine: the ledger is real, the engine a transport that streams answers."""

import asyncio
import json
import threading
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve: pip install 'fulmen[serve]'")

import httpx
from transformers import LlamaConfig

from fulmen.serving.accounts import Account
from fulmen.serving.books import open_books
from fulmen.serving.gateway.app import Gateway
from fulmen.serving.gateway.dialects import OpenAiDialect
from fulmen.serving.gateway.errors import ApiError
from fulmen.serving.gateway.job import Call, Job
from fulmen.serving.served_model import ServedModel

WAIT_S = 30
ALICE = Account("alice", None, "salt")
USAGE = {"prompt_tokens": 500_000, "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": 0}}
CHUNKS = (
    {"choices": [{"index": 0, "delta": {"content": "a"}, "finish_reason": None}], "usage": USAGE},
    {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}], "usage": USAGE},
    {"choices": [], "usage": USAGE},
)


class AnsweringEngine(httpx.AsyncBaseTransport):
    """Counts who asks it."""

    def __init__(self):
        self.asked = 0

    async def handle_async_request(self, request):
        self.asked += 1
        events = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in CHUNKS)
        return httpx.Response(200, stream=httpx.ByteStream(events.encode()))


@pytest.fixture
def gateway(tmp_path):
    model = ServedModel(Path("m"), "m", LlamaConfig(num_hidden_layers=1), None, 2048, "", frozenset())
    upstream, settings = AnsweringEngine(), SimpleNamespace(key="k")
    engine = SimpleNamespace(
        url="http://engine", ready=True, settings=settings, transport=lambda limits: upstream
    )
    gateway = Gateway(model, engine, open_books(tmp_path))
    gateway.upstream = upstream
    return gateway


async def answer_of(gateway):
    """All that the client gets of one request."""
    job = Job(gateway, Call("/v1/chat/completions", {"stream": True}, ALICE, OpenAiDialect(False)))
    await asyncio.wait_for(job.task, WAIT_S)
    return [job.pieces.get_nowait() for _ in range(job.pieces.qsize())]


def test_the_engine_is_asked_while_the_ledger_writes_but_nothing_leaves_before(gateway):
    ledger, written = gateway.books.ledger, threading.Event()
    begin = ledger.begin

    def slow(*request):
        assert written.wait(WAIT_S)
        begin(*request)

    async def live():
        await answer_of(gateway)
        ledger.begin = slow
        job = Job(gateway, Call("/v1/chat/completions", {"stream": True}, ALICE, OpenAiDialect(False)))
        while not job.first_at:
            await asyncio.sleep(0.01)
        for _ in range(10):
            await asyncio.sleep(0)
        assert job.pieces.empty()
        written.set()
        await asyncio.wait_for(job.task, WAIT_S)
        assert b'"content":"a"' in job.pieces.get_nowait()

    asyncio.run(asyncio.wait_for(live(), WAIT_S))
    assert [row.outcome for row in ledger.rows()] == ["done", "done"]


def test_an_account_without_money_reaches_the_engine_no_more(gateway):
    gateway.books.ledger.deposit("alice", Decimal(1), "test")

    async def live():
        # The first takes all that there is; the second was let in for its money, and gets nothing.
        paid, refused, again = [await answer_of(gateway) for _ in range(3)]
        assert b"[DONE]" in paid[-2]
        for pieces in (refused, again):
            assert isinstance(pieces[0], ApiError)
            assert (pieces[0].status, pieces[1:]) == (402, [None])

    asyncio.run(live())
    assert gateway.upstream.asked == 2
    assert [row.outcome for row in gateway.books.ledger.rows()] == ["done"]
