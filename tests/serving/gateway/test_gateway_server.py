"""The whole server, as its users see it: vLLM behind the gateway, asked by the clients that people have."""

import asyncio
import os
import random
import re
import stat
from collections import Counter
from decimal import Decimal
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

if not find_spec("vllm"):
    pytest.skip("vLLM is not installed: pip install 'fulmen[serve-cpu]'", allow_module_level=True)

from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import psutil
import schemathesis
import uvicorn
from benchmarks.gateway import fuzz
from hypothesis import HealthCheck, given, settings
from typer.testing import CliRunner

from fulmen.cli.main import app
from fulmen.pipeline.model_config import read_config
from fulmen.serving.billing.prices import DEFAULT_PRICES, Tokens
from fulmen.serving.billing.store import open_billing
from fulmen.serving.engine.served_model import served_model
from fulmen.serving.gateway.app import create_app
from fulmen.serving.gateway.gateway import Gateway
from fulmen.serving.page import FILES
from tests.processes import WAIT_S, family_of, runs, until
from tests.serving.served import (
    ALICE,
    BOB,
    QUESTION,
    ask,
    client,
    engine_figures,
    engine_of,
    engine_socket,
    leave,
    row,
    settled,
    start,
)

LONG = "The lighthouse keeper counts forty-two ships. " * 40
# Requests made up for each operation; FUZZED=500 looks longer.
FUZZING = settings(
    max_examples=int(os.environ.get("FUZZED", "15")),
    suppress_health_check=list(HealthCheck),
)

# Schemas take the engine's time: the benchmark has them.
SLOW_KINDS = ("schemas", "leaving")


def refusal(server, **fields):
    with pytest.raises(openai.APIStatusError) as caught:
        ask(server, **fields)
    return caught.value.status_code, caught.value.body["param"]


def test_it_says_what_it_serves_at_what_price(server):
    said = "".join(server.lines)
    assert "tiny: dense attention, context 16,384 tokens" in said
    assert "CNY per million tokens: 0.2 prompt in cache, 2 prompt computed, 3 output" in said
    assert [model.id for model in client(server).models.list()] == ["tiny"]
    info = httpx.get(f"{server.url}/fulmen/info").json()
    assert (info["context"], info["needs_key"], info["dsa"]) == (16384, True, None)
    assert info["prices"] == {"hit": "0.2", "miss": "2", "output": "3"}


@pytest.mark.parametrize("beyond", [0, 1])
def test_a_body_may_be_as_large_as_the_page_is_told(server, beyond):
    most = httpx.get(f"{server.url}/fulmen/info").json()["max_body_bytes"]
    headers = {"authorization": f"Bearer {ALICE}", "content-type": "application/json"}
    body = b'{"model": "m", "text": "' + b"a" * (most - 26 + beyond) + b'"}'
    assert len(body) == most + beyond
    said = httpx.post(f"{server.url}/chat/completions", content=body, headers=headers, timeout=WAIT_S)
    assert said.status_code == (400 if beyond else 422)
    assert said.json()["error"]["param"] == (None if beyond else "messages")
    assert (f"{most:,} bytes" in said.text) == bool(beyond)


def test_the_page_and_its_parts_are_there_and_nothing_beside_them(server):
    for path, file in FILES.items():
        answer = httpx.get(server.url + path)
        assert answer.content == file.path.read_bytes()
        assert answer.headers["content-type"] == file.media_type
        assert "script-src 'self'" in answer.headers["content-security-policy"]
    for path in ("/__init__.py", "/../app.py", "/page.json"):
        assert httpx.get(server.url + path).status_code == 404


@pytest.mark.parametrize("path", ["", "/v1", "/beta"])
def test_an_answer_has_usage_and_its_cost_is_in_the_ledger(server, path):
    answer = ask(server, path=path)
    usage = answer.usage.model_dump()
    hit, miss = usage["prompt_cache_hit_tokens"], usage["prompt_cache_miss_tokens"]
    assert hit + miss == usage["prompt_tokens"] > 0
    assert usage["prompt_tokens_details"]["cached_tokens"] == hit
    assert usage["completion_tokens"] == 4
    entry = row(server, answer.id.removeprefix("chatcmpl-"))
    assert (entry.account, entry.outcome) == ("alice", "done")
    assert entry.charge == Decimal(usage["fulmen"]["cost"]) == DEFAULT_PRICES.cost(Tokens(hit, miss, 4))


def test_a_stream_ends_with_usage_in_its_last_chunk(server):
    chunks = list(ask(server, stream=True))
    assert all(len(chunk.choices) == 1 for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason == "length"
    assert [chunk.usage is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    asked = list(ask(server, stream=True, stream_options={"include_usage": True}))
    assert asked[-1].choices == []
    assert asked[-1].usage.completion_tokens == chunks[-1].usage.completion_tokens == 4
    assert asked[-1].usage.prompt_cache_hit_tokens is not None


def test_without_a_good_key_nothing_is_answered(server):
    for key in ("sk-unknown-0123456789", "x"):
        with pytest.raises(openai.AuthenticationError) as caught:
            ask(server, key=key)
        assert key not in str(caught.value)
    assert httpx.post(f"{server.url}/chat/completions", json={}).status_code == 401


def test_one_request_more_than_the_key_may_have_gets_429(server):
    with ask(
        server, key=server.one, stream=True, max_tokens=15000, extra_body={"ignore_eos": True}
    ) as stream:
        next(iter(stream))
        with pytest.raises(openai.RateLimitError):
            ask(server, key=server.one)
    until(lambda: is_answered(server, server.one))


def is_answered(server, key):
    try:
        return ask(server, key=key).usage
    except openai.RateLimitError:
        return None


@pytest.mark.parametrize("endpoint", ["chat", "completions", "messages", "responses"])
@pytest.mark.parametrize("streams", [True, False], ids=["stream", "plain"])
def test_a_client_that_leaves_ends_the_request_and_pays_for_what_was_made(server, endpoint, streams):
    body = {"model": "tiny", "max_tokens": 15000, "stream": streams, "ignore_eos": True}
    asked = {"completions": {"prompt": LONG}, "responses": {"input": "Who are you?"}}
    body |= asked.get(endpoint, {"messages": QUESTION})
    path = {"chat": "/chat/completions", "messages": "/anthropic/v1/messages"}
    made = leave(server, path.get(endpoint, f"/{endpoint}"), body)
    entry = settled(server, made)
    assert entry.outcome == "dropped"
    assert 0 < entry.output < 15000
    assert entry.charge > 0
    # The engine tells its gauges a step after it has ended a request.
    until(lambda: not any(engine_figures(server, "vllm:num_requests_")))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"model": "gpt"}, (400, "model")),
        ({"max_tokens": 10**6}, (400, "max_tokens")),
        ({"messages": [{"role": "user", "content": "ship " * 8 * 5000}]}, (400, "messages")),
        ({"messages": [{"role": "user", "content": "ship " * 8 * 5000}], "stream": True}, (400, "messages")),
        ({"temperature": 3}, (422, "temperature")),
    ],
)
def test_bad_input_is_refused_by_field_and_costs_nothing(server, fields, expected):
    spent = server.ledger.balance("alice")
    assert refusal(server, **fields) == expected
    assert server.ledger.balance("alice") == spent


def test_a_schema_that_no_answer_can_meet_is_refused(server):
    number = {"type": "integer", "minimum": 5, "maximum": 3}
    schema = {"type": "object", "properties": {"a": number}, "required": ["a"], "additionalProperties": False}
    tool = {"type": "function", "function": {"name": "f", "strict": True, "parameters": schema}}
    assert refusal(server, tools=[tool], tool_choice="required") == (422, "tools[0].function.parameters")


@pytest.mark.parametrize("body", [b"", b"{", b'{"model": "\xff"}', b"[]", b"null", b'"a"'])
def test_bodies_that_are_no_request_are_4xx(server, body):
    headers = {"authorization": f"Bearer {ALICE}", "content-type": "application/json"}
    answer = httpx.post(f"{server.url}/chat/completions", content=body, headers=headers)
    assert answer.status_code in (400, 422)
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_fulmen_chat_talks_to_it(server, monkeypatch):
    asked = ["chat", "--url", server.url, "--prompt", "Who are you?", "--max-new-tokens", "4"]
    refused = CliRunner().invoke(app, asked)
    assert refused.exit_code == 2
    assert "answered 401" in refused.stderr
    assert "set FULMEN_API_KEY" in refused.stderr
    monkeypatch.setenv("FULMEN_API_KEY", ALICE)
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0, done.stderr
    assert done.stdout.strip()
    assert re.fullmatch(
        r"\[\d+ prompt tokens, \d+ of them in the cache; 4 output; attention read 100 % of its context; "
        r"0\.\d+ CNY, 0\.\d+ with dense attention\]\n",
        done.stderr,
    )


def test_metrics_count_what_was_charged(server):
    def counted():
        lines = httpx.get(f"{server.url}/metrics").text.splitlines()
        return {line.split()[0]: float(line.split()[1]) for line in lines if not line.startswith("#")}

    before, answer, after = counted(), ask(server, stream=True, stream_options={"include_usage": True}), None
    usage = list(answer)[-1].usage
    after = counted()
    kinds = {"hit": usage.prompt_cache_hit_tokens, "miss": usage.prompt_cache_miss_tokens, "output": 4}
    for kind, count in kinds.items():
        name = f'fulmen_tokens_total{{kind="{kind}"}}'
        assert after[name] - before[name] == count
    assert after["fulmen_first_token_seconds_count"] == before["fulmen_first_token_seconds_count"] + 1
    assert not any("alice" in name for name in after)


def test_no_request_makes_the_server_fail(server):
    """Requests made up from the server's own description of itself."""
    described = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    counted, headers = Counter(), {"authorization": f"Bearer {BOB}"}
    for operation in described.get_all_operations():

        @FUZZING
        @given(operation.ok().as_strategy())
        def holds(case):
            if isinstance(case.body, dict):
                # Else nearly all would end at the model's name, or never.
                case.body |= {"model": "tiny", "max_tokens": 2, "max_output_tokens": 2, "n": 1}
            answer = case.call(base_url=server.url, headers=headers, timeout=WAIT_S)
            assert answer.status_code in (200, 400, 404, 422), answer.text
            assert answer.status_code == 200 or answer.json()["error"]["message"]
            counted[case.path, answer.status_code] += 1

        holds()
    print(counted)
    assert {path for path, _ in counted} >= {"/chat/completions", "/completions", "/anthropic/v1/messages"}
    assert all(counted[path, 200] for path in ("/chat/completions", "/completions", "/models"))


def test_no_odd_request_makes_the_server_fail_or_answer_without_a_reason(server):
    """Of those of benchmarks/gateway/fuzz.py: bodies that are no JSON, odd heads, halves of characters."""
    seen = fuzz.Seen()

    async def ask_some():
        for number in range(8 * FUZZING.max_examples):
            name = f"test:{number}"
            made = fuzz.make_request(random.Random(name), "tiny")
            if made.kind not in SLOW_KINDS:
                await fuzz.ask(server.url, made, seen, name, BOB)

    asyncio.run(ask_some())
    assert not seen.problems, seen.examples
    assert set(seen.statuses) >= {
        "plain",
        "numbers",
        "strings",
        "shapes",
        "bodies",
        "fields",
        "paths",
        "wire",
    }
    assert ask(server).usage


@pytest.fixture
def impatient(server, tmp_path):
    """A second gateway in this process, before the same engine, that keeps alive every 2 ms."""
    settings = SimpleNamespace(key=engine_of(server.process).environ()["VLLM_API_KEY"], context=16384)
    socket = engine_socket(server.process)
    engine = SimpleNamespace(
        url="http://engine",
        ready=True,
        restarts=0,
        settings=settings,
        transport=lambda limits: httpx.AsyncHTTPTransport(uds=socket, limits=limits),
    )
    model = served_model(server.model, read_config(server.model)[1])
    gateway = Gateway(model, engine, open_billing(tmp_path / "other"), keep_alive_s=0.002)
    return gateway, create_app(gateway)


@pytest.mark.parametrize("streams", [True, False], ids=["stream", "plain"])
def test_a_waiting_client_gets_signs_of_life_and_then_its_answer(impatient, streams):
    body = {"model": "tiny", "messages": QUESTION, "max_tokens": 300, "stream": streams, "ignore_eos": True}

    async def talk():
        gateway, app = impatient
        config = uvicorn.Config(app, port=0, log_level="warning", lifespan="off")
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        async with httpx.AsyncClient(timeout=WAIT_S) as http:
            answer = await http.post(f"http://127.0.0.1:{port}/chat/completions", json=body)
        server.should_exit = True
        await serving
        await gateway.close()
        return answer

    answer = asyncio.run(talk())
    assert answer.status_code == 200
    if streams:
        assert ": keep-alive\n\n" in answer.text
        assert answer.text.endswith("data: [DONE]\n\n")
    else:
        assert answer.text.startswith("\n\n")
        assert answer.json()["usage"]["completion_tokens"] == 300


def test_nobody_reaches_the_engine_but_by_the_gateway(server):
    """Its sockets are in a private folder; torch's process groups, which answer nothing, are on loopback."""
    gateway, *below = family_of(server.process.pid)
    places = [at.laddr for at in gateway.net_connections("tcp") if at.status == psutil.CONN_LISTEN]
    assert [at.port for at in places] == [int(server.url.rpartition(":")[2])]
    folder = Path(engine_socket(server.process)).parent
    assert (folder.stat().st_uid, stat.S_IMODE(folder.stat().st_mode)) == (os.getuid(), 0o700)
    listening = set()
    for process in below:
        names = {at.laddr for at in process.net_connections("unix") if at.laddr}
        assert {Path(name).parent for name in names} <= {folder}
        connections = process.net_connections("tcp")
        assert {at.laddr.ip for at in connections} <= {"127.0.0.1"}
        listening |= {at.laddr.port for at in connections if at.status == psutil.CONN_LISTEN}
    assert listening

    def silent(port):
        with pytest.raises(httpx.HTTPError):
            httpx.post(f"http://127.0.0.1:{port}/invocations", json={}, timeout=1)
        return True

    with ThreadPoolExecutor(len(listening)) as asking:
        assert all(asking.map(silent, listening))


def test_the_engine_does_not_stand_back_on_a_busy_machine(server):
    assert len({process.nice() for process in family_of(server.process.pid)}) == 1


@pytest.mark.parametrize("path", ["invocations", "tokenize", "scale_elastic_ep", "v1/models/../../docs"])
def test_the_gateway_hands_on_no_path_that_it_does_not_know(server, path):
    headers = {"authorization": f"Bearer {ALICE}"}
    answer = httpx.post(f"{server.url}/{path}", json={"prompt": "a"}, headers=headers)
    assert answer.status_code in (404, 405)


def test_the_engine_asks_for_large_pages(server):
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.is_file() or "[madvise]" not in setting.read_text():
        pytest.skip("Linux gives large pages here to whoever takes memory, or to nobody")
    asked_kib = 0
    for process in family_of(engine_of(server.process).pid):
        maps = Path(f"/proc/{process.pid}/smaps").read_text()
        sizes = map(int, re.findall(r"^Size: +(\d+) kB$", maps, re.MULTILINE))
        flags = re.findall(r"^VmFlags: (.*)$", maps, re.MULTILINE)
        asked_kib += sum(size for size, some in zip(sizes, flags, strict=True) if "hg" in some.split())
    assert asked_kib > 2**20, "less than the cache, which is 1 GiB"


def test_a_killed_gateway_takes_its_engine_along_and_its_next_start_charges_once(server):
    process, spent = server.process, server.ledger.balance("alice")
    engine = family_of(engine_of(process).pid)
    before = {entry.request_id for entry in server.ledger.rows()}
    # Log probabilities tell tokens: a chunk has several where the engine is ahead of who reads it.
    options = {"max_tokens": 15000, "logprobs": True, "extra_body": {"ignore_eos": True}}
    seen, stream = [], iter(ask(server, stream=True, **options))
    (made,) = {entry.request_id for entry in server.ledger.rows()} - before
    while not (noted := row(server, made)).output:
        seen.append(next(stream))
    assert noted.state == "open"
    process.kill()
    with pytest.raises((openai.APIError, httpx.HTTPError)):
        seen.extend(stream)
    process.communicate()
    until(lambda: not any(map(runs, engine)))
    server.process, server.lines = start(server.model, server.state)
    server.url = server.lines[-1].split()[-1]
    assert "1 requests that the last run left open were charged" in "".join(server.lines)
    entry = row(server, made)
    assert (entry.state, entry.outcome) == ("settled", "crashed")
    # The prompt as if cached, as nobody said what was; the last token may have been on its way.
    assert (entry.prompt_miss, entry.prompt_hit) == (0, noted.prompt_hit)
    delivered = sum(len(chunk.choices[0].logprobs.content) for chunk in seen if chunk.choices[0].logprobs)
    assert noted.output <= entry.output <= delivered + 1
    assert server.ledger.recover() == 0
    assert entry.charge == DEFAULT_PRICES.cost(Tokens(entry.prompt_hit, 0, entry.output))
    assert server.ledger.balance("alice") == spent - entry.charge
    assert ask(server).usage


def test_a_lost_engine_costs_what_was_delivered_is_said_and_comes_back(server):
    stream = ask(server, stream=True, max_tokens=15000, extra_body={"ignore_eos": True})
    chunks = iter(stream)
    identity = next(chunks).id.removeprefix("chatcmpl-")
    next(chunks)
    engine_of(server.process).kill()
    with pytest.raises((openai.APIError, httpx.HTTPError)):
        list(chunks)
    entry = settled(server, identity)
    assert entry.outcome == "engine lost"
    assert entry.output > 0
    # Its connections end a moment before the process does.
    until(lambda: health(server) == 503)
    with pytest.raises(openai.APIStatusError) as caught:
        ask(server)
    assert caught.value.status_code == 503
    assert caught.value.response.headers["retry-after"]
    until(lambda: health(server) == 200)
    assert ask(server).usage


def health(server):
    return httpx.get(f"{server.url}/health").status_code
