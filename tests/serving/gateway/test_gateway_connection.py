"""What reaches the gateway before a request exists: heads, endless or slow; asked by plain sockets."""

import json
import socket
import threading
import time
from contextlib import ExitStack, contextmanager

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve: pip install 'fulmen[serve]'")

import uvicorn

from fulmen.serving.billing.accounts import Accounts
from fulmen.serving.gateway.admission.auth import AuthMiddleware, Keys
from fulmen.serving.gateway.admission.connection import Connection
from tests.processes import WAIT_S, until

KEY = "sk-0123456789abcdef"
GET = b"GET /page HTTP/1.1\r\nHost: localhost\r\n\r\n"


class Patient(Connection):
    """No time ends before a test has read its answer, however busy the machine is."""

    HEAD_S = WRITE_S = LINGER_S = float(WAIT_S)


class Crowded(Patient):
    """With few connections."""

    MOST_CONNECTIONS = 4


class Hurried(Connection):
    """With times that a test can wait for."""

    HEAD_S, WRITE_S, LINGER_S = 0.3, 0.3, 0.1


LEFT = []


async def application(scope, receive, send):
    """Says what it was asked; /flood sends more than a socket holds, /wait notes when its client leaves."""
    if scope["path"].startswith("/wait"):
        while (await receive())["type"] != "http.disconnect":
            pass
        LEFT.append(scope["path"])
        return
    body = (await receive())["body"] if scope["method"] == "POST" else b""
    names = [name.decode() for name, _ in scope["headers"]]
    said = json.dumps({"path": scope["path"], "body": body.decode(), "fields": names}).encode()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for _ in range(400 if scope["path"] == "/flood" else 0):
        await send({"type": "http.response.body", "body": bytes(2**16), "more_body": True})
    await send({"type": "http.response.body", "body": said})


@contextmanager
def running(keys, protocol=Patient):
    """The port of a server in a thread."""
    config = uvicorn.Config(
        AuthMiddleware(application, keys, most=1000),
        port=0,
        http=protocol,
        ws="none",
        lifespan="off",
        log_level="warning",
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    until(lambda: server.started)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = server.force_exit = True
        thread.join()


@pytest.fixture(scope="module")
def port(tmp_path_factory):
    with running(Keys(Accounts(tmp_path_factory.mktemp("state")))) as port:
        yield port


@pytest.fixture(scope="module")
def hurried(tmp_path_factory):
    with running(Keys(Accounts(tmp_path_factory.mktemp("state"))), Hurried) as port:
        yield port


def talk(port, *pieces):
    """All that comes back to these bytes until the server closes, or it has answered and waits."""
    with socket.create_connection(("127.0.0.1", port), timeout=WAIT_S) as client:
        for piece in pieces:
            try:
                client.sendall(piece)
            except OSError:
                break
        return read_all(client)


def read_all(client):
    """Until the server closes; after an answer of known length it need not."""
    came = b""
    while not came.endswith(b"}") and not came.endswith(b"0\r\n\r\n"):
        piece = client.recv(2**16)
        if not piece:
            break
        came += piece
    return came


def status_of(answer):
    return int(answer.split()[1]) if answer else None


def fields(count, size):
    return b"".join(b"X-%d: %s\r\n" % (i, b"a" * size) for i in range(count))


CHUNKED = b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
ENDLESS = [b"a" * 10_000] * 200


@pytest.mark.parametrize(
    ("pieces", "status", "named"),
    [
        ([b"GET /" + b"a" * 9000], 414, "8,192 bytes of URL"),
        ([b"GET /"] + [b"a" * 1000] * 500, 414, "8,192 bytes of URL"),
        ([b"GET / HTTP/1.1\r\n" + fields(102, 1)], 431, "100 header fields"),
        ([b"GET / HTTP/1.1\r\n" + fields(6, 8000)], 431, "32,768 bytes of header fields"),
        ([b"GET / HTTP/1.1\r\nX: " + b"a" * 2**20], 431, "32,768 bytes"),
        ([b"GET / HTTP/1.1\r\nX: ", *ENDLESS], 431, "32,768 bytes"),
        ([b"GET / HTTP/1.1\r\n", *ENDLESS], 431, "32,768 bytes"),
        ([CHUNKED + b"1;x=", *ENDLESS], 431, "32,768 bytes"),
        ([CHUNKED + b"0\r\n" + fields(102, 1)], 431, "100 header fields"),
        ([CHUNKED + b"0\r\nX: ", *ENDLESS], 431, "32,768 bytes"),
    ],
)
def test_a_head_without_end_is_refused_and_says_which_bound(port, pieces, status, named):
    answer = talk(port, *pieces)
    assert status_of(answer) == status
    error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
    assert named in error["message"]


@pytest.mark.parametrize("size", [1, 7, 40, 1000])
def test_requests_are_answered_however_their_bytes_are_cut(port, size):
    sent = b"POST /a HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\n" + fields(40, 200) + b"\r\nabc"
    answer = talk(port, *(sent[start : start + size] for start in range(0, len(sent), size)))
    assert status_of(answer) == 200
    assert b'"body": "abc"' in answer


def test_a_large_body_before_the_next_head_is_no_large_head(port):
    first = b"POST /a HTTP/1.1\r\nHost: localhost\r\nContent-Length: 900\r\n\r\n" + b"b" * 900
    answer = talk(port, (first + b"GET /b HTTP/1.1\r\nHo") + b"st: localhost\r\nConnection: close\r\n\r\n")
    assert answer.count(b"HTTP/1.1 200") == 1 or b"/b" in answer


def test_pipelined_requests_are_answered_in_order(port):
    paths = [b"/p%d" % i for i in range(20)]
    sent = b"".join(b"GET %s HTTP/1.1\r\nHost: localhost\r\n\r\n" % path for path in paths[:-1])
    sent += b"GET %s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n" % paths[-1]
    with socket.create_connection(("127.0.0.1", port), timeout=WAIT_S) as client:
        client.sendall(sent)
        came = b""
        while piece := client.recv(2**16):
            came += piece
    places = [came.index(b'"path": "%s"' % path) for path in paths]
    assert places == sorted(places)


@pytest.mark.parametrize("behind", [b"", GET, GET * 3, b"nonsense\r\n\r\n"])
def test_a_request_learns_that_its_client_is_gone_whatever_came_behind_it(port, behind):
    path = f"/wait{len(behind)}"
    with socket.create_connection(("127.0.0.1", port), timeout=WAIT_S) as client:
        client.sendall(GET.replace(b"/page", path.encode()) + behind)
        time.sleep(0.1)
    until(lambda: path in LEFT)


@pytest.mark.parametrize(
    "sent",
    [
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nContent-Length: 3\r\n\r\nabc",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: x\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999999999999999\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET / HTTP/1.1\nHost: a\n\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"NONSENSE / HTTP/1.1\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET / HTTP/1.1\r\nX\x00: b\r\n\r\n",
        b"GET / HTTP/1.1\r\nX: b\x00\r\n\r\n",
        b"GET / HTTP/1.1\r\nX: b\r\n folded\r\n\r\n",
        b"CONNECT localhost:80 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ],
)
def test_what_is_no_request_or_two_at_once_is_400_and_the_connection_ends(port, sent):
    """None of them may be read one way here and another way by a proxy before it."""
    with socket.create_connection(("127.0.0.1", port), timeout=WAIT_S) as client:
        client.sendall(sent)
        answer = b""
        while piece := client.recv(2**16):
            answer += piece
    assert status_of(answer) == 400
    assert answer.count(b"HTTP/1.1") == 1
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"]


@pytest.mark.parametrize("kind", [b"websocket", b"h2c"])
def test_an_upgrade_is_answered_without_one_and_never_read_without_its_body(port, kind):
    upgrade = b"Connection: Upgrade\r\nUpgrade: " + kind + b"\r\n"
    answer = talk(port, GET[:-2] + upgrade + b"\r\n" + GET)
    assert (status_of(answer), answer.count(b"HTTP/1.1")) == (200, 1)
    head = b"POST /u HTTP/1.1\r\nHost: localhost\r\n" + upgrade
    answer = talk(port, head + b"Content-Length: 3\r\n\r\nabc")
    assert (status_of(answer), b'"Upgrade"' in answer) == (400, True)


def test_a_field_behind_the_body_is_none_of_the_head(port):
    assert b'"authorization"' not in talk(port, CHUNKED + b"0\r\nAuthorization: x\r\n\r\n")


@pytest.mark.parametrize(
    "first", [b"", b"GET / HT", b"\r\n", GET + b"GET / HTTP/1.1\r\nX: 1", GET.replace(b"GET", b"FOO")[:4]]
)
def test_a_head_that_does_not_end_is_ended(hurried, first):
    with socket.create_connection(("127.0.0.1", hurried), timeout=WAIT_S) as client:
        client.sendall(first)
        answer = b""
        while piece := client.recv(2**16):
            answer += piece
    last = answer[answer.rfind(b"HTTP/1.1") :]
    assert status_of(last) in (None, 400, 408)
    assert status_of(last) == 408 or not first.startswith(b"GET")


@pytest.mark.parametrize(
    ("first", "drop"),
    [
        (b"GET / HTTP/1.1\r\n", b"X: a\r\n"),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n", b"a"),
    ],
    ids=["of a head", "of a body that nobody reads"],
)
def test_drops_do_not_keep_a_connection(hurried, first, drop):
    with socket.create_connection(("127.0.0.1", hurried), timeout=WAIT_S) as client:
        client.sendall(first)
        until(lambda: is_refused(client, drop))


def is_refused(client, drop):
    """Whether a connection that has ended says so to another drop."""
    try:
        client.send(drop)
    except OSError:
        return True
    return False


def test_a_client_that_takes_nothing_loses_its_answer(hurried):
    with socket.create_connection(("127.0.0.1", hurried), timeout=WAIT_S) as client:
        client.sendall(GET.replace(b"/page", b"/flood"))
        until(lambda: is_refused(client, b"\r\n"))


def test_idle_connections_make_room_for_new_ones(tmp_path):
    with running(Keys(Accounts(tmp_path)), Crowded) as port, ExitStack() as held:
        for _ in range(40):
            held.enter_context(socket.create_connection(("127.0.0.1", port), timeout=WAIT_S))
        assert status_of(talk(port, GET)) == 200


@pytest.mark.parametrize(
    ("field", "status"),
    [
        (b"Host: localhost", 200),
        (b"Host: LOCALHOST:8000", 200),
        (b"Host: 127.0.0.1:8000", 200),
        (b"Host: 127.1.2.3", 200),
        (b"Host: [::1]:8000", 200),
        (b"Host: app.localhost", 200),
        (b"Host: localhost\r\nOrigin: http://localhost:3000", 200),
        (b"X: no host", 200),
        (b"Host: evil.example", 421),
        (b"Host: localhost.evil.example", 421),
        (b"Host: 127.0.0.1.nip.io", 421),
        (b"Host: evil.example@localhost", 200),
        (b"Host: localhost@evil.example", 421),
        (b"Host: localhost\r\nHost: evil.example", 421),
        (b"Host: 192.168.0.7", 421),
        (b"Host: [::1", 421),
        (b"Host: \xff", 421),
        (b"Host:", 421),
        (b"Host: localhost\r\nOrigin: https://evil.example", 403),
        (b"Host: localhost\r\nOrigin: null", 403),
    ],
)
@pytest.mark.parametrize("asked", [b"GET /page", b"GET /metrics", b"POST /v1/chat/completions"])
def test_without_keys_only_this_machine_is_answered(port, field, status, asked):
    answer = talk(port, asked + b" HTTP/1.1\r\nContent-Length: 0\r\n" + field + b"\r\n\r\n")
    assert status_of(answer) == status
    if status != 200:
        assert ("Origin" if status == 403 else "Host") in json.loads(answer.partition(b"\r\n\r\n")[2])[
            "error"
        ]["param"]


def test_with_keys_any_name_of_the_server_is_answered(tmp_path):
    with running(Keys(Accounts(tmp_path, f"alice:{KEY}"))) as port:
        head = b"POST / HTTP/1.1\r\nHost: models.example\r\nContent-Length: 0\r\nAuthorization: Bearer "
        assert status_of(talk(port, head + KEY.encode() + b"\r\n\r\n")) == 200
        assert status_of(talk(port, head + b"\xff\xfe\r\n\r\n")) == 401


@pytest.mark.parametrize(
    "head",
    [
        b"Content-Length: 100000\r\n\r\n",
        b"Transfer-Encoding: chunked\r\n\r\n" + b"1f4\r\n" + b"a" * 500 + b"\r\n",
    ],
)
def test_a_body_too_large_is_refused_counted_or_announced(port, head):
    more = [b"1f4\r\n" + b"a" * 500 + b"\r\n"] * 10
    answer = talk(port, b"POST / HTTP/1.1\r\nHost: localhost\r\n" + head, *more)
    assert status_of(answer) == 400
    assert b"1,000 bytes" in answer
