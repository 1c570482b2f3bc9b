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

from fulmen.serving.billing.accounts import Account
from fulmen.serving.billing.store import open_billing
from fulmen.serving.engine.served_model import ServedModel
from fulmen.serving.gateway.dialects.openai import OpenAiDialect
from fulmen.serving.gateway.errors import ApiError
from fulmen.serving.gateway.gateway import Gateway
from fulmen.serving.gateway.jobs.engine_job import EngineJob, EngineRequest
from fulmen.serving.gateway.jobs.streaming_reply import StreamingReply
from tests.processes import WAIT_S

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
    gateway = Gateway(model, engine, open_billing(tmp_path))
    gateway.upstream = upstream
    return gateway


def a_stream():
    return EngineRequest("/v1/chat/completions", {"stream": True}, ALICE, OpenAiDialect(False))


async def answer_of(gateway):
    """All that the client gets of one request."""
    job = EngineJob(
        gateway, EngineRequest("/v1/chat/completions", {"stream": True}, ALICE, OpenAiDialect(False))
    )
    await asyncio.wait_for(job.task, WAIT_S)
    return [job.pieces.get_nowait() for _ in range(job.pieces.qsize())]


def test_the_engine_is_asked_while_the_ledger_writes_but_nothing_leaves_before(gateway):
    ledger, written = gateway.billing.ledger, threading.Event()
    begin = ledger.begin

    def slow(*request):
        assert written.wait(WAIT_S)
        begin(*request)

    async def live():
        await answer_of(gateway)
        ledger.begin = slow
        job = EngineJob(
            gateway, EngineRequest("/v1/chat/completions", {"stream": True}, ALICE, OpenAiDialect(False))
        )
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
    gateway.billing.ledger.deposit("alice", Decimal(1), "test")

    async def live():
        # The first takes all that there is; the second was let in for its money, and gets nothing.
        paid, refused, again = [await answer_of(gateway) for _ in range(3)]
        assert b"[DONE]" in paid[-2]
        for pieces in (refused, again):
            assert isinstance(pieces[0], ApiError)
            assert (pieces[0].status, pieces[1:]) == (402, [None])

    asyncio.run(live())
    assert gateway.upstream.asked == 2
    assert [row.outcome for row in gateway.billing.ledger.rows()] == ["done"]


class FailingEngine(httpx.AsyncBaseTransport):
    """Fails when there has been a sign of life."""

    def __init__(self):
        self.may_fail = asyncio.Event()

    async def handle_async_request(self, request):
        await self.may_fail.wait()
        return httpx.Response(500, json={"error": {"message": "no", "code": 500}})


async def sent_by(gateway, body, when_sent=lambda: None):
    """What the server is told to send for a request whose client waits; calls a function each time."""
    sent, gone = [], asyncio.Event()

    async def receive():
        await gone.wait()

    async def send(message):
        sent.append(message)
        when_sent()

    call = EngineRequest("/v1/chat/completions", body, ALICE, OpenAiDialect(False))
    scope = {"type": "http", "path": "/chat/completions"}
    await asyncio.wait_for(StreamingReply(gateway, call)(scope, receive, send), WAIT_S)
    return sent


@pytest.mark.parametrize("streams", [True, False], ids=["stream", "plain"])
def test_an_error_after_signs_of_life_is_an_event_or_breaks_the_answer_off(gateway, streams):
    engine = FailingEngine()
    gateway.client, gateway.keep_alive_s = httpx.AsyncClient(transport=engine), 0.02
    start, *pieces = asyncio.run(sent_by(gateway, {"stream": streams}, engine.may_fail.set))
    said = b"".join(piece["body"] for piece in pieces)
    assert start["status"] == 200
    assert (b'"error"' in said) == streams
    assert any(not piece["more_body"] for piece in pieces) == streams
    assert streams or not said.strip()


@pytest.mark.parametrize("streams", [True, False], ids=["stream", "plain"])
def test_while_its_schema_is_checked_a_request_can_still_be_refused(gateway, streams):
    class Slow:
        async def check(self, account, schemas):
            await asyncio.sleep(0.2)
            raise ApiError(422, "too slow", schemas[0].field)

    gateway.grammars, gateway.keep_alive_s = Slow(), 0.02
    schema = {"type": "json_schema", "json_schema": {"schema": {}}}
    start, body = asyncio.run(sent_by(gateway, {"stream": streams, "response_format": schema}))
    assert start["status"] == 422
    assert json.loads(body["body"])["error"]["param"] == "response_format.json_schema.schema"
    assert gateway.upstream.asked == 0
    assert list(gateway.billing.ledger.rows()) == []
