"""One client for all that ask a model: what it sends, and what it says of servers that fail."""

import re

import pytest

from fulmen.endpoints import ATTEMPTS, Endpoint, EndpointBusy, RequestRefused, read_json
from fulmen.errors import EndpointError
from tests.pipeline.chat_server import BREAK_OFF, MODEL, ChatServer, fail, say

BODY = {"messages": []}


def test_addresses_are_completed_and_looked_at():
    assert Endpoint("http://127.0.0.1:8000").url == Endpoint("http://127.0.0.1:8000/v1/").url
    assert Endpoint("https://example.org/api").url == "https://example.org/api"
    for url in (
        *("127.0.0.1:8000", "ftp://example.org", "http://", "http://[", "", "http://localhost:99999"),
        *("http://local host", "http://localhost/ü", "http://localhost:x"),
    ):
        with pytest.raises(EndpointError, match=f"url={re.escape(repr(url))} is no address"):
            Endpoint(url)


def test_a_key_that_no_header_takes_is_not_shown():
    for key in ("secret\n", "secrét"):
        with pytest.raises(EndpointError, match="characters that no key has") as caught:
            Endpoint("http://127.0.0.1:8000", key)
        assert "secr" not in str(caught.value)


def test_what_a_stranger_wrote_as_json_can_be_written_on():
    assert read_json(b'{"a": "\\ud800 b", "\\ud83d\\ude00": [1.5, null]}') == {"a": "? b", "😀": [1.5, None]}
    for text in ("[" * 100_000, "{", "", b"\xff"):
        with pytest.raises(ValueError, match=r".+"):
            read_json(text)


def test_it_sends_the_key_and_reads_the_answer(monkeypatch):
    monkeypatch.setenv("FULMEN_API_KEY", "of-the-user")
    with ChatServer([say("Hello"), say("Hello")]) as server:
        assert [row["id"] for row in Endpoint(server.url).models()] == [MODEL]
        answer = Endpoint(server.url).call("/chat/completions", BODY)
        Endpoint(server.url, "another").call("/chat/completions", BODY)
    assert answer["choices"][0]["message"]["content"] == "Hello"
    assert server.keys == ["Bearer of-the-user", "Bearer another"]


@pytest.mark.parametrize(
    "listed", [None, "x", [], ["x", None], [{}, {"id": None}, {"id": ""}, {"id": 5}]], ids=repr
)
def test_models_without_a_name_are_none(listed):
    class Listing(Endpoint):
        def call(self, *_, **__):
            return {"data": listed}

    assert Listing("http://127.0.0.1:1").models() == []


def test_a_busy_server_is_asked_again_but_not_for_ever():
    busy = fail(503, "starting", Retry_After="0")
    told = []
    with ChatServer([busy, busy, say("Hello"), *[busy] * ATTEMPTS]) as server:
        endpoint = Endpoint(server.url)

        def note(error, wait_s):
            told.append((str(error), wait_s))

        assert "choices" in endpoint.call_again("/chat/completions", BODY, note)
        assert told == [(f"{server.url}/chat/completions answered 503: starting", 0)] * 2
        with pytest.raises(EndpointBusy, match="answered 503: starting"):
            endpoint.call_again("/chat/completions", BODY, note)
        assert server.script == []


@pytest.mark.parametrize(
    ("line", "error", "said"),
    [
        (fail(400, "the context is 10 tokens"), RequestRefused, "answered 400: the context is 10 tokens"),
        (fail(401, "no key"), EndpointError, "answered 401: no key; set FULMEN_API_KEY"),
        (fail(500, "no\nmore"), EndpointError, "answered 500: no more"),
        (BREAK_OFF, EndpointBusy, "broke off"),
        ({"break_off": 500}, EndpointError, "answered 500: Internal Server Error"),
        ({"body": b"[" * 10**5}, EndpointError, "answered no JSON"),
    ],
)
def test_failures_are_one_line(line, error, said):
    with ChatServer([line]) as server, pytest.raises(EndpointError, match=said) as caught:
        Endpoint(server.url).call("/chat/completions", BODY)
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)
    assert getattr(caught.value, "is_too_long", False) == (error is RequestRefused)
