"""Who gets in: keys, requests at a time, size and time of a body. Asked as an ASGI server asks."""

import asyncio
import json

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve: pip install 'fulmen[serve]'")

from fulmen.serving.billing.accounts import Account, Accounts
from fulmen.serving.gateway.admission.auth import AuthMiddleware, Keys
from fulmen.serving.gateway.admission.concurrency import ConcurrencyLimiter
from fulmen.serving.gateway.errors import ApiError

KEY = "sk-0123456789abcdef"


async def application(scope, receive, send):
    """Says who asked and what came."""
    said = await receive() if scope["method"] == "POST" else {"body": b""}
    account = scope.get("state", {}).get("account")
    answer = {"account": account and account.id, "bytes": len(said["body"])}
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": json.dumps(answer).encode()})


def ask(keys, pieces=(b"",), headers=(), method="POST", path="/v1/models", pause=0.0, **limits):
    """Status and body of the answer; None if there was none."""
    left, sent = list(pieces), []

    async def receive():
        await asyncio.sleep(pause)
        if not left:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": left.pop(0), "more_body": bool(left)}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": method, "path": path, "headers": list(headers)}
    asyncio.run(AuthMiddleware(application, keys, **limits)(scope, receive, send))
    return (sent[0]["status"], json.loads(sent[1]["body"])) if sent else None


@pytest.fixture
def keys(tmp_path):
    return Keys(Accounts(tmp_path, f"alice:{KEY}"))


@pytest.mark.parametrize(
    "headers",
    [[(b"authorization", b"Bearer " + KEY.encode())], [(b"x-api-key", KEY.encode())]],
    ids=["bearer", "x-api-key"],
)
def test_a_key_gets_in_either_way(keys, headers):
    assert ask(keys, [b"ab", b"c"], headers) == (200, {"account": "alice", "bytes": 3})


@pytest.mark.parametrize(
    "sent", [b"", b"Bearer", b"Bearer sk-wrong-key-0123456789", b"Basic x", b"Bearer \xff\xfe"]
)
def test_without_a_good_key_the_body_is_not_even_read(keys, sent):
    status, body = ask(keys, [], [(b"authorization", sent)])
    assert (status, body["error"]["type"]) == (401, "authentication_error")
    assert "sk-" not in body["error"]["message"]


@pytest.mark.parametrize(
    ("path", "status"), [("/", 200), ("/metrics", 200), ("/v1/models", 401), ("/user/balance", 401)]
)
def test_pages_are_open_and_an_accounts_own_things_are_not(keys, path, status):
    assert ask(keys, method="GET", path=path)[0] == status


def test_without_any_key_everybody_is_one_anonymous_account(tmp_path):
    keys = Keys(Accounts(tmp_path))
    assert ask(keys)[1]["account"] == "anonymous"
    assert (
        keys.account_of({}).salt == keys.account_of({}).salt != Keys(Accounts(tmp_path)).account_of({}).salt
    )
    Accounts(tmp_path).issue("bob")
    assert ask(keys)[0] == 401


@pytest.mark.parametrize("headers", [[], [(b"content-length", b"11")]], ids=["counted", "announced"])
def test_a_body_too_big_is_refused(tmp_path, headers):
    keys = Keys(Accounts(tmp_path))
    status, body = ask(keys, [b"123456", b"123456"], headers, most=10)
    assert (status, body["error"]["type"]) == (400, "invalid_request_error")
    assert "10 bytes" in body["error"]["message"]


def test_a_body_too_slow_is_refused_and_a_client_that_leaves_gets_nothing(tmp_path):
    keys = Keys(Accounts(tmp_path))
    assert ask(keys, [b"a", b"b"], pause=5, seconds=0.01)[0] == 400
    assert ask(keys, []) is None


def test_errors_speak_the_dialect_of_the_path(keys):
    assert ask(keys, path="/anthropic/v1/messages")[1]["type"] == "error"


def test_slots_are_counted_by_account_and_in_all():
    limiter, one, free = ConcurrencyLimiter(2), Account("one", 1, ""), Account("free", None, "")
    with limiter.hold(one):
        with pytest.raises(ApiError) as caught, limiter.hold(one):
            pass
        assert caught.value.status == 429
        with limiter.hold(free):
            assert len(limiter) == 2
            with pytest.raises(ApiError) as caught, limiter.hold(free):
                pass
            assert caught.value.status == 503
    assert len(limiter) == 0
    with limiter.hold(one):
        assert len(limiter) == 1
