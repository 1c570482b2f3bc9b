"""HTTP connections within bounds: what a head may hold, how long it may take, how many may stay open.

uvicorn's protocol with httptools keeps whatever it is sent until a head is complete, for any time and of any
length, and joins it anew with each piece. The bounds here end that before a request exists, so that they hold
for whoever reaches the port, with a key or without.
"""

import asyncio
import json
import resource
from http import HTTPStatus
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from fulmen.serving.gateway.errors import ApiError

# Most programs are given 1,024 files, however many they may ask for.
FILES = 16384
_OF_BODIES = (b"content-length", b"transfer-encoding")


def allow_files() -> None:
    """Ask for more open files than a program gets by itself: each request takes two."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class Connection(HttpToolsProtocol):
    """One client's connection.

    Attributes:
        MOST_URL_BYTES, MOST_HEAD_BYTES, MOST_FIELDS: of a request's target; of target, header fields and
            trailers together; of fields. More is answered by 414 or 431.
        HEAD_S: seconds from a connection's start, or from the first byte after an answer, to the end of the
            next head; then 408. What is left of a body that nobody reads must come within them too.
        WRITE_S: seconds that an answer may wait for a client that takes nothing.
        LINGER_S: seconds in which a refused client may read why, before its connection is closed.
        MOST_CONNECTIONS: open at a time, fewer where the system allows fewer files. One more closes the one
            that has been idle longest; 503 if none is idle.
    """

    MOST_URL_BYTES, MOST_HEAD_BYTES, MOST_FIELDS = 8 * 2**10, 32 * 2**10, 100
    HEAD_S, WRITE_S, LINGER_S = 20.0, 120.0, 2.0
    MOST_CONNECTIONS = 2048

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._in_head = self._moved = self._refused = False
        self._head_bytes = self._fields = self._unread_bytes = 0
        self._since = self.loop.time()
        self._cycles: list[RequestResponseCycle] = []
        self._deadline: asyncio.TimerHandle | None = None
        self._write_deadline: asyncio.TimerHandle | None = None

    @property
    def idle(self) -> bool:
        """Whether no request is being answered."""
        return not self._open

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has come: its first head is due."""
        super().connection_made(transport)
        self._expect_head()
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        most = self.MOST_CONNECTIONS if files < 0 else min(self.MOST_CONNECTIONS, files // 3)
        if len(self.connections) > most:
            others = [one for one in self.connections if isinstance(one, Connection) and one is not self]
            idle = [one for one in others if one.idle and not one.transport.is_closing()]
            if idle:
                min(idle, key=lambda one: one._since).transport.close()
            else:
                self._refuse(ApiError(503, f"{most} connections are in use; try again shortly"))

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone, and so is all that waits for it."""
        super().connection_lost(exc)
        self._end_cycles()
        self._unset_keepalive_if_required()
        for timer in (self._deadline, self._write_deadline):
            if timer is not None:
                timer.cancel()

    def data_received(self, data: bytes) -> None:
        """Bytes of a request."""
        if self._refused:
            return
        if self.timeout_keep_alive_task is not None:
            self._unset_keepalive_if_required()
            self._expect_head()
        self._moved = False
        try:
            self.parser.feed_data(data)
            self._unread_bytes = 0 if self._moved else self._unread_bytes + len(data)
            _bound(self._unread_bytes, self.MOST_HEAD_BYTES, 431, "bytes of one header field")
        except httptools.HttpParserUpgrade:
            # There is nothing to change to: the request is answered, and what follows it is not read.
            if self.cycle is not None:
                self.cycle.keep_alive = False
        except ApiError as error:
            self._refuse(error)
        except httptools.HttpParserError as error:
            said = error.__context__
            self._refuse(said if isinstance(said, ApiError) else ApiError(400, f"no HTTP request: {error}"))

    def on_message_begin(self) -> None:
        """A request's first byte."""
        super().on_message_begin()
        self._in_head = self._moved = True
        self._head_bytes = self._fields = 0
        self._expect_head()

    def on_url(self, url: bytes) -> None:
        """Part of its target. Raises ApiError 414."""
        super().on_url(url)
        self._head_bytes += len(url)
        _bound(self._head_bytes, self.MOST_URL_BYTES, 414, "bytes of URL")

    def on_header(self, name: bytes, value: bytes) -> None:
        """A field; those behind a chunked body count, and are left out. Raises ApiError 431."""
        self._head_bytes += len(name) + len(value)
        self._fields += 1
        _bound(self._head_bytes, self.MOST_HEAD_BYTES, 431, "bytes of header fields")
        _bound(self._fields, self.MOST_FIELDS, 431, "header fields")
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The head is there, and may be answered. Raises ApiError 400 for an upgrade with a body."""
        self._in_head, self._moved = False, True
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        if self.parser.should_upgrade() and any(name in _OF_BODIES for name, _ in self.headers):
            raise ApiError(400, "the header Upgrade cannot be with a body; leave it out", "Upgrade")
        super().on_headers_complete()
        self._cycles = [*self._open, self.cycle]

    def on_body(self, body: bytes) -> None:
        """Part of the body."""
        self._moved = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The end of the body."""
        self._moved = True
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """An answer has ended."""
        self._since = self.loop.time()
        super().on_response_complete()

    def pause_writing(self) -> None:
        """The client takes no more for now."""
        super().pause_writing()
        self._write_deadline = self.loop.call_later(self.WRITE_S, self.transport.abort)

    def resume_writing(self) -> None:
        """The client takes more."""
        super().resume_writing()
        if self._write_deadline is not None:
            self._write_deadline.cancel()

    @property
    def _open(self) -> list[RequestResponseCycle]:
        """Requests not answered yet; those sent without waiting for an answer stand in line."""
        return [cycle for cycle in self._cycles if not cycle.response_complete]

    def _end_cycles(self) -> None:
        """Tell every request that its client is gone; uvicorn tells the last one alone."""
        for cycle in self._open:
            cycle.disconnected = True
            cycle.message_event.set()

    def _expect_head(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(self.HEAD_S, self._end_late)

    def _end_late(self) -> None:
        if self._in_head:
            self._refuse(ApiError(408, f"the head took more than {self.HEAD_S:.0f} s; send it at once"))
        else:
            self.transport.close()

    def _refuse(self, error: ApiError) -> None:
        """Say why, once and last. An answer under way just ends."""
        self._refused = True
        begun = any(cycle.response_started for cycle in self._open)
        self._end_cycles()
        if begun:
            self.transport.close()
            return
        body = json.dumps(error.body).encode()
        status = f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}"
        fields = f"content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close"
        self.transport.write(f"{status}\r\n{fields}\r\n\r\n".encode() + body)
        # Closed at once, with input unread, the connection would be reset and the answer lost.
        self.transport.write_eof()
        self.loop.call_later(self.LINGER_S, self.transport.close)


def _bound(found: int, most: int, status: int, what: str) -> None:
    if found > most:
        raise ApiError(status, f"the request has more than {most:,} {what}; send less")
