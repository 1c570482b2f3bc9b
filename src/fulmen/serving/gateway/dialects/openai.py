"""Chat and completions: OpenAI's way to stream and to report usage, with DeepSeek's fields."""

import json
from typing import Any

from fulmen.serving.gateway.dialects.base import Event
from fulmen.serving.gateway.dialects.deepseek import rename_reasoning
from fulmen.serving.gateway.errors import ApiError, engine_error
from fulmen.serving.gateway.usage import UsageCounter, usage_for_client

DONE = b"data: [DONE]\n\n"


class OpenAiDialect:
    """Chat and completions.

    Args:
        asked_usage: whether the client wants usage in a chunk of its own, without choices. If not, it comes
            with the answer's last chunk, as DeepSeek sends it: who did not ask expects a choice in each.
    """

    def __init__(self, asked_usage: bool) -> None:
        self.usage = UsageCounter()
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
        usage = usage_for_client(self.usage, bill)
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
        return answer | {"usage": usage_for_client(self.usage, bill)}

    def broken(self, error: ApiError) -> bytes:
        """As `Dialect`."""
        return _openai_event(error.body)


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


def _openai_event(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
