"""A request's JSON is read once and within bounds; what cannot be passed on is refused by its field."""

import asyncio
import json

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve: pip install 'fulmen[serve]'")

import httpx
from fastapi import APIRouter, FastAPI

from fulmen.serving.gateway import errors
from fulmen.serving.gateway.admission.json_body import MOST_PARTS, JsonRoute, read_json
from fulmen.serving.gateway.dialects.requests import ChatRequest
from fulmen.serving.gateway.errors import ApiError

JSON = {"content-type": "application/json"}
HALF = "\\ud83d"


def refused(body):
    with pytest.raises(ApiError) as caught:
        read_json(body if isinstance(body, bytes) else body.encode())
    json.dumps(caught.value.body, ensure_ascii=False).encode()
    return caught.value.status, caught.value.param


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (f'{{"messages": [{{"role": "user", "content": "{HALF}"}}]}}', "messages[0].content"),
        (f'{{"messages": [{{"content": [{{"text": "a{HALF}b"}}]}}]}}', "messages[0].content[0].text"),
        (f'{{"model": "{HALF}"}}', "model"),
        ('{"stop": ["a", "\\udc00"]}', "stop[1]"),
        (f'{{"metadata": {{"user_id": "{HALF}{HALF}"}}}}', "metadata.user_id"),
        (f'{{"tools": [{{"parameters": {{"{HALF}": {{}}}}}}]}}', "tools[0].parameters.\ufffd"),
        (f'{{"{HALF}": 1}}', "\ufffd"),
        (f'{{"a": "{HALF} \\ude00"}}', "a"),
        ('{"temperature": NaN}', "temperature"),
        ('{"a": [1, -Infinity]}', "a[1]"),
        ('{"a": {"minimum": 1e400}}', "a.minimum"),
        ('{"a": -1E+400}', "a"),
        ('{"a": ' + "9" * 400 + ".5}", "a"),
        ('{"seed": ' + "9" * 25 + "}", "seed"),
        ('{"a": -' + "9" * 4000 + "}", "a"),
    ],
)  # fmt: skip
def test_strings_and_numbers_that_cannot_be_passed_on_are_named(body, field):
    assert refused(body) == (400, field)


@pytest.mark.parametrize(
    "body",
    [
        b"", b" ", b"{", b'{"a": 1} {"b": 2}', b"{'a': 1}", b'{"a": "\xff"}', b'{"a": "\xed\xa0\x80"}',
        "{}".encode("utf-16"), b"\xef\xbb\xbf{}", b'{"a": "\x00"}', b'{"a": ' + b"9" * 5000 + b"}",
        b"[" * 100_000, b"[" * 300 + b"]" * 300, b'{"a":' * 300 + b"1" + b"}" * 300, b'{"a": tru}',
        b"\x1f\x8b\x08", b'"' + b"a" * 2**20 + b"\\ud800" + b'"',
    ],
)  # fmt: skip
def test_what_is_no_json_is_400(body):
    assert refused(body) == (400, None)


@pytest.mark.parametrize(
    "body",
    [
        b"[" + b"[]," * 500_000 + b"[]]",
        b"{" + b",".join(b'"%d":1' % i for i in range(MOST_PARTS + 1)) + b"}",
        b"[" + b"1," * 3_000_000 + b"1]",
    ],
)
def test_more_values_than_can_be_read_in_passing_are_refused(body):
    assert refused(body) == (400, None)


@pytest.mark.parametrize(
    "value",
    [
        {"a": "😀 \x00 ß \U0010ffff", "b": [1, -1.5, 2**63 - 1, -(2**63), 1e300, True, None]},
        {"text": '[{"a": 1, "b\\"": [' * 60_000 + "\\" * 7},
        {"text": "12345678901234567890123 1e400"},
        {"ids": list(range(100_000))},
        "text",
        None,
    ],
)
def test_everything_else_is_read_as_it_is(value):
    for ascii_only in (True, False):
        assert read_json(json.dumps(value, ensure_ascii=ascii_only).encode()) == value


def post(content, headers):
    """The answer of a route that takes a chat."""
    app, routes = FastAPI(), APIRouter(route_class=JsonRoute)
    errors.install(app)

    @routes.post("/chat")
    async def chat(request: ChatRequest) -> str:
        return request.model

    async def ask():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.post("/chat", content=content, headers=headers)

    app.include_router(routes)
    return asyncio.run(ask())


CHAT = json.dumps({"model": "m", "messages": [{"role": "user", "content": "Hi"}]}).encode()


@pytest.mark.parametrize(
    "kind", ["application/json", "Application/JSON; charset=utf-8", "application/vnd.api+json"]
)
def test_json_is_taken_under_its_names(kind):
    answer = post(CHAT, {"content-type": kind})
    assert (answer.status_code, answer.json()) == (200, "m")


@pytest.mark.parametrize(
    "kind",
    [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "json"],
)
def test_another_content_type_is_named_as_such(kind):
    """A page of another site can send these without asking first; JSON it cannot."""
    answer = post(CHAT, {} if kind is None else {"content-type": kind})
    said = answer.json()["error"]
    assert (answer.status_code, said["param"]) == (415, "Content-Type")
    assert "application/json" in said["message"]
    assert (kind or "missing") in said["message"]


def test_a_packed_body_is_not_unpacked():
    answer = post(CHAT, {**JSON, "content-encoding": "gzip"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (415, "Content-Encoding")


def test_a_half_of_a_pair_is_refused_and_the_answer_can_be_read():
    answer = post(CHAT.replace(b"Hi", b"\\ud800"), JSON)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages[0].content")
