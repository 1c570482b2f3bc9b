"""Chats in DeepSeek-V3.2's encoding, for a model that was trained on it and has another template, or none.

The text is written and read here: the engine's template hands on the one message that it gets, and its
parsers rest. Calls that a request forces are the exception: the engine holds them to the format and to the
tool's schema, and reads them itself.
"""

import json
import re
from collections import defaultdict
from typing import Any

from fulmen.errors import MessageError
from fulmen.messages.encoding import ReplyParser, encode, joined
from fulmen.messages.encoding.markup import EOS, THINK_CLOSE, THINK_OPEN
from fulmen.serving.gateway.dialects.base import Event
from fulmen.serving.gateway.errors import ApiError

_OF_CALLS = ("tools", "tool_choice", "parallel_tool_calls")
_PLACE = re.compile(r"messages\[\d+\](\.\w+)?")


def v32_body(
    body: dict[str, Any], messages: list[dict[str, Any]], offered: list[dict[str, Any]], thinking: bool
) -> dict[str, Any]:
    """The engine's body with the chat as one text.

    Args:
        body: as it would be for the model's own template.
        messages: of the request, with `prefix` where the last one is to go on.
        offered: tools as the request has them; in the body they may be held to their schemas.
        thinking: whether the model thinks before it answers. What a schema forces leaves no room for that:
            then the thoughts end where they begin.

    Raises ApiError for messages that cannot be written, naming the place.
    """
    choice = body.get("tool_choice")
    is_forced = choice not in (None, "auto", "none")
    is_strict = choice != "none" and any(tool["function"].get("strict") for tool in offered)
    if is_strict and thinking and not is_forced:
        why = "strict cannot be kept to while the model thinks; leave it out, or turn thinking off"
        raise ApiError(400, f"tools: {why}", "tools")
    try:
        text = encode(messages, tools=offered if choice != "none" else None, thinking=thinking)
    except MessageError as error:
        place = _PLACE.match(str(error))
        raise ApiError(400, str(error), place[0] if place else "messages") from error
    if text.endswith(THINK_OPEN) and (is_forced or "response_format" in body):
        text += THINK_CLOSE
    left_out = {"chat_template_kwargs", *(() if is_forced or is_strict else _OF_CALLS)}
    stops = body.get("stop") or []
    return {key: value for key, value in body.items() if key not in left_out} | {
        "messages": [{"role": "user", "content": text}],
        "stop": [*([stops] if isinstance(stops, str) else stops), EOS],
        # Marks of the format may be tokens of their own.
        "skip_special_tokens": False,
    }


class V32Reader:
    """Rewrites the engine's answer, which is text, to messages with thoughts and calls; see `Cleaner`.

    Args:
        body: what `v32_body` returned.
        calls_before: how many calls the conversation has had, from which ids count on.
    """

    def __init__(self, body: dict[str, Any], calls_before: int) -> None:
        thinking = body["messages"][0]["content"].endswith(THINK_OPEN)
        self._replies: defaultdict[int, _Reply] = defaultdict(
            lambda: _Reply(ReplyParser(thinking, calls_before))
        )

    def event(self, event: Event) -> list[Event]:
        """The stream's next event, rewritten."""
        if event.data == "[DONE]":
            return [event]
        chunk = json.loads(event.data)
        for choice in chunk.get("choices") or []:
            reply, delta = self._replies[choice["index"]], choice.get("delta") or {}
            read = reply.read(delta.pop("content", None) or "", bool(choice.get("finish_reason")))
            calls = [*(delta.pop("tool_calls", None) or []), *_calls_of(read)]
            choice["delta"] = delta | _texts_of(read) | ({"tool_calls": calls} if calls else {})
            reply.finish(choice, bool(calls))
        return [Event(event.name, json.dumps(chunk))]

    def answer(self, answer: dict[str, Any]) -> None:
        """Rewrite an answer that does not stream."""
        for choice in answer.get("choices") or []:
            reply, message = self._replies[choice["index"]], choice.get("message") or {}
            read = reply.read(message.get("content") or "", is_over=True)
            calls = message.get("tool_calls") or ([] if reply.is_broken else joined(read)["tool_calls"])
            message |= {"content": "", **_texts_of(read), "tool_calls": calls}
            if not calls:
                del message["tool_calls"]
            reply.finish(choice, bool(calls))


class _Reply:
    """One choice. What is written as a call and cannot be read as one is no text, and no call either."""

    def __init__(self, parser: ReplyParser) -> None:
        self._parser = parser
        self.is_broken = self._has_called = False

    def read(self, text: str, is_over: bool) -> list[dict[str, Any]]:
        """Deltas of a piece of the reply."""
        read: list[dict[str, Any]] = []
        if self.is_broken:
            return read
        try:
            read += self._parser.feed(text)
            read += self._parser.close() if is_over else []
        except MessageError:
            self.is_broken = True
            read += self._parser.take()
        return read

    def finish(self, choice: dict[str, Any], calls: bool) -> None:
        """Say how the choice ended, if it has; `calls`: whether this piece of it has some."""
        self._has_called = self._has_called or calls
        if choice.get("stop_reason") == EOS:
            choice["stop_reason"] = None
        is_whole = choice.get("finish_reason") == "stop" and choice.get("stop_reason") is None
        if is_whole and self._has_called and not self.is_broken:
            choice["finish_reason"] = "tool_calls"


def _texts_of(deltas: list[dict[str, Any]]) -> dict[str, str]:
    """Content and reasoning of the deltas, by the engine's names, where there is any."""
    said = joined(delta for delta in deltas if "tool_calls" not in delta)
    texts = {"content": said["content"], "reasoning": said["reasoning_content"]}
    return {name: text for name, text in texts.items() if text}


def _calls_of(deltas: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [call for delta in deltas for call in delta.get("tool_calls", ())]
