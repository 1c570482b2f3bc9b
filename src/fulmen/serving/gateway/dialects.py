"""The engine's answers, read and rewritten: OpenAI's and Anthropic's way to stream and to report usage."""

import json
from collections.abc import AsyncIterator
from typing import Any, NamedTuple, Protocol

from fulmen.serving.gateway.deepseek import rename_reasoning
from fulmen.serving.gateway.errors import ApiError, engine_error
from fulmen.serving.gateway.usage import UsageSeen, shown_usage

DONE = b"data: [DONE]\n\n"


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

    usage: UsageSeen

    def feed(self, event: Event) -> bytes: ...

    def tail(self, bill: dict[str, Any]) -> bytes: ...

    def read_plain(self, answer: dict[str, Any]) -> None: ...

    def plain(self, answer: dict[str, Any], bill: dict[str, Any]) -> dict[str, Any]: ...

    def broken(self, error: ApiError) -> bytes: ...


class OpenAiDialect:
    """Chat and completions.

    Args:
        asked_usage: whether the client wants usage in a chunk of its own, without choices. If not, it comes
            with the answer's last chunk, as DeepSeek sends it: who did not ask expects a choice in each.
    """

    def __init__(self, asked_usage: bool) -> None:
        self.usage = UsageSeen()
        self._asked_usage = asked_usage
        self._held: list[dict[str, Any]] = []

    def feed(self, event: Event) -> bytes:
        """As `Dialect`. Raises ApiError for an error that the engine streams."""
        chunk = chat_chunk(event)
        if chunk is None:
            return b""
        usage, choices = chunk.pop("usage", None), chunk["choices"]
        if not choices:
            self.usage.finish(usage or {})
            self._held.append(chunk)
            return b""
        if usage:
            self.usage.note(choices[0]["index"], usage)
        for choice in choices:
            rename_reasoning(choice.get("delta", {}))
        if self._held or any(choice.get("finish_reason") for choice in choices):
            self._held.append(chunk)
            return b""
        return _openai_event(chunk | {"usage": None})

    def tail(self, bill: dict[str, Any]) -> bytes:
        """As `Dialect`."""
        usage = shown_usage(self.usage, bill)
        ends = [chunk | {"usage": None} for chunk in self._held if chunk["choices"]]
        if self._asked_usage or not ends:
            ends += [chunk | {"usage": usage} for chunk in self._held if not chunk["choices"]]
        else:
            ends[-1]["usage"] = usage
        return b"".join(map(_openai_event, ends)) + DONE

    def read_plain(self, answer: dict[str, Any]) -> None:
        """As `Dialect`."""
        self.usage.finish(answer.get("usage") or {})

    def plain(self, answer: dict[str, Any], bill: dict[str, Any]) -> dict[str, Any]:
        """As `Dialect`."""
        for choice in answer.get("choices", []):
            rename_reasoning(choice.get("message", {}))
        return answer | {"usage": shown_usage(self.usage, bill)}

    def broken(self, error: ApiError) -> bytes:
        """As `Dialect`."""
        return _openai_event(error.body)


class AnthropicDialect:
    """Messages."""

    def __init__(self) -> None:
        self.usage = UsageSeen()
        self._held: list[Event] = []

    def feed(self, event: Event) -> bytes:
        """As `Dialect`; a delta counts as one token until the end says how many there were."""
        if event.data == "[DONE]":
            return b""
        said = json.loads(event.data)
        if event.name == "error":
            raise engine_error(500, said)
        if event.name == "message_start":
            self.usage.note(0, {"prompt_tokens": said["message"]["usage"]["input_tokens"]})
        elif event.name == "content_block_delta":
            seen = {"prompt_tokens": self.usage.prompt, "completion_tokens": self.usage.output + 1}
            self.usage.note(0, seen)
        elif event.name == "message_delta":
            self.usage.finish_anthropic(said.get("usage") or {})
        if self._held or event.name == "message_delta":
            self._held.append(event)
            return b""
        return _named_event(event)

    def tail(self, bill: dict[str, Any]) -> bytes:
        """As `Dialect`."""
        return b"".join(map(_named_event, self._held))

    def read_plain(self, answer: dict[str, Any]) -> None:
        """As `Dialect`."""
        self.usage.finish_anthropic(answer.get("usage") or {})

    def plain(self, answer: dict[str, Any], bill: dict[str, Any]) -> dict[str, Any]:
        """As `Dialect`."""
        return answer

    def broken(self, error: ApiError) -> bytes:
        """As `Dialect`."""
        return _named_event(Event("error", json.dumps(error.anthropic_body)))


def chat_chunk(event: Event) -> dict[str, Any] | None:
    """A chunk of a chat's stream; None at its end. Raises ApiError for an error that the engine streams."""
    if event.data == "[DONE]":
        return None
    chunk = json.loads(event.data)
    if "error" in chunk:
        # With a status of its own: what is wrong with a request may be found when its stream has begun.
        code = chunk["error"].get("code") if isinstance(chunk["error"], dict) else None
        raise engine_error(code if isinstance(code, int) else 500, chunk)
    return chunk


async def events_of(pieces: AsyncIterator[bytes]) -> AsyncIterator[Event]:
    """The events of a stream, however its bytes are cut. Comments are left out."""
    rest = b""
    async for piece in pieces:
        *whole, rest = (rest + piece).split(b"\n\n")
        for block in whole:
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


def _openai_event(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def _named_event(event: Event) -> bytes:
    name = f"event: {event.name}\n" if event.name else ""
    return f"{name}data: {event.data}\n\n".encode()
