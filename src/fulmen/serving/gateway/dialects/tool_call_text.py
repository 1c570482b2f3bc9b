"""Answers without the marks of tool calls: what is written as a call and cannot be read as one is no text.

From the first mark on nothing is shown, as in vLLM's own streams; a call that was read is sent as one.
"""

import json
from collections import defaultdict
from typing import Any

from fulmen.serving.gateway.dialects.base import Event


class Unmarked:
    """A text that comes in pieces, up to the first mark; what may be the start of one waits.

    Args:
        marks: what calls begin with.
    """

    def __init__(self, marks: tuple[str, ...]) -> None:
        self._marks = marks
        self._waiting = ""
        self._over = False

    def feed(self, piece: str) -> str:
        """What can be shown now."""
        text, self._waiting = self._waiting + piece, ""
        found = [place for mark in self._marks if (place := text.find(mark)) >= 0]
        if self._over or found:
            self._over = True
            return text[: min(found)] if found and text else ""
        keep = max((_overlap(text, mark) for mark in self._marks), default=0)
        if keep:
            text, self._waiting = text[:-keep], text[-keep:]
        return text

    def end(self) -> str:
        """What waited, when nothing comes any more."""
        rest, self._waiting = self._waiting, ""
        return rest


def _overlap(text: str, mark: str) -> int:
    """How many of the text's last characters are the mark's first."""
    longest = min(len(text), len(mark) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(mark[:size])), 0)


class CleanChat:
    """Rewrites a chat's answer before it is read: text without marks, and calls that end it as such."""

    def __init__(self, marks: tuple[str, ...]) -> None:
        self._texts: defaultdict[int, Unmarked] = defaultdict(lambda: Unmarked(marks))
        self._called: set[int] = set()

    def event(self, event: Event) -> list[Event]:
        """The stream's next event, rewritten."""
        if event.data == "[DONE]":
            return [event]
        chunk = json.loads(event.data)
        for choice in chunk.get("choices") or []:
            self._clean(choice, choice.get("delta") or {}, choice["index"])
        return [Event(event.name, json.dumps(chunk))]

    def answer(self, answer: dict[str, Any]) -> None:
        """Rewrite an answer that does not stream."""
        for choice in answer.get("choices") or []:
            self._clean(choice, choice.get("message") or {}, choice["index"])

    def _clean(self, choice: dict[str, Any], said: dict[str, Any], index: int) -> None:
        text, over = self._texts[index], choice.get("finish_reason")
        if said.get("tool_calls"):
            self._called.add(index)
        shown = text.feed(said.get("content") or "") + (text.end() if over else "")
        if shown or said.get("content"):
            said["content"] = shown
        # vLLM says "stop" where a call was forced by its name.
        if over == "stop" and index in self._called and choice.get("stop_reason") is None:
            choice["finish_reason"] = "tool_calls"


class CleanMessages:
    """The same for Anthropic's events; there an answer that does not stream is put together from them."""

    def __init__(self, marks: tuple[str, ...]) -> None:
        self._marks = marks
        self._text = Unmarked(marks)

    def event(self, event: Event) -> list[Event]:
        """The stream's next event, rewritten; before a block's end, what waited of its text."""
        said = json.loads(event.data) if event.data != "[DONE]" else {}
        delta = said.get("delta") or {}
        if said.get("type") == "content_block_delta" and delta.get("type") == "text_delta":
            delta["text"] = self._text.feed(delta["text"])
            return [Event(event.name, json.dumps(said))] if delta["text"] else []
        rest = self._text.end() if said.get("type") == "content_block_stop" else ""
        if not rest:
            return [event]
        more = {"type": "content_block_delta", "index": said["index"]}
        more["delta"] = {"type": "text_delta", "text": rest}
        return [Event("content_block_delta", json.dumps(more)), event]

    def answer(self, answer: dict[str, Any]) -> None:
        """Rewrite an answer that does not stream."""
        for block in answer.get("content") or []:
            if block.get("type") == "text":
                text = Unmarked(self._marks)
                block["text"] = text.feed(block["text"]) + text.end()
