"""How an engine's answer is read and rewritten for a client: what every dialect does, and events."""

from collections.abc import AsyncIterator
from typing import Any, NamedTuple, Protocol

from fulmen.serving.gateway.errors import ApiError
from fulmen.serving.gateway.usage import UsageCounter


class Event(NamedTuple):
    """One server-sent event: its name, if it has one, and its data."""

    name: str | None
    data: str


class Dialect(Protocol):
    """How one request's answer is read.

    `feed` takes the stream's events one by one and returns what goes to the client now; `tail` returns what
    is held back until the bill is made: the chunk that ends the answer and all after it. `plain` rewrites
    an answer that does not stream; `broken` is what a stream ends with that failed midway.
    """

    usage: UsageCounter

    def feed(self, event: Event) -> bytes: ...

    def tail(self, bill: dict[str, Any]) -> bytes: ...

    def read_plain(self, answer: dict[str, Any]) -> None: ...

    def plain(self, answer: dict[str, Any], bill: dict[str, Any]) -> dict[str, Any]: ...

    def broken(self, error: ApiError) -> bytes: ...


class Cleaner(Protocol):
    """Rewrites the engine's answer before the dialect reads it: events of a stream, or a whole answer."""

    def event(self, event: Event) -> list[Event]: ...

    def answer(self, answer: dict[str, Any]) -> None: ...


async def events_of(pieces: AsyncIterator[bytes]) -> AsyncIterator[Event]:
    """The events of a stream, however its bytes are cut. Comments are left out."""
    rest = b""
    async for piece in pieces:
        *blocks, rest = (rest + piece).split(b"\n\n")
        for block in blocks:
            if (event := _read_event(block.decode())) is not None:
                yield event


def _read_event(block: str) -> Event | None:
    name, data = None, []
    for line in block.split("\n"):
        field, _, value = line.partition(": ")
        if field == "event":
            name = value
        elif field == "data":
            data.append(value)
    return Event(name, "\n".join(data)) if data else None


def event_bytes(event: Event) -> bytes:
    """As it goes over the wire."""
    name = f"event: {event.name}\n" if event.name else ""
    return f"{name}data: {event.data}\n\n".encode()
