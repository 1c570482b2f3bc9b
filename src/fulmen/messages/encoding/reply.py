"""A model's reply, whole or in pieces, to a message in OpenAI's shape.

What is not as it should be is read where only one reading is possible:

- a call without the block around it, or in a block or invocation whose end is missing;
- a call inside the thinking, which it ends;
- a parameter without its end before the next one or before the call's end;
- a parameter that does not say whether it is text, or says JSON and is none: JSON if it can be, else text,
  unless that has the end of a tag, whose name has a quotation mark then;
- arguments as one JSON object in place of parameters.

What follows the calls is left out: results that a model makes up are none. A reply that ends within a call, a
block without calls, a parameter given twice and any other text inside a block are refused: MessageError.
A reply without calls is never refused.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from fulmen.errors import MessageError
from fulmen.messages.encoding.markup import (
    CALLS_CLOSE,
    CALLS_OPEN,
    EOS,
    INVOKE,
    INVOKE_CLOSE,
    PARAMETER,
    PARAMETER_CLOSE,
    THINK_CLOSE,
    THINK_OPEN,
)

# A part of an assistant's message: `delta` of OpenAI's streams, with DeepSeek's `reasoning_content`.
Delta = dict[str, Any]

# A tag with a longer name is none. Names have no quotation mark: the format has no way to write one.
MAX_TAG = 1024
_INVOKE_TAG = re.compile(r'\s+name="([^"]*)"\s*>')
_PARAMETER_TAG = re.compile(r'\s+name="([^"]*)"(?:\s+string="(\w*)")?\s*>')
_REST_OF_TAG = re.compile(r'"\s+string="\w*"\s*>')
_ANY_TAG = re.compile(r'(?:\s+name="[^"]*"|(?!\s+name="))[^>]*>')


def _after_lines(mark: str, lines: int) -> list[str]:
    """A mark with up to so many line ends before it, which belong to it."""
    return ["\n" * count + mark for count in range(lines, -1, -1)]


_CALL_MARKS = [*_after_lines(CALLS_OPEN, 2), *_after_lines(INVOKE, 2)]
_THINKING_MARKS, _CONTENT_MARKS = (THINK_CLOSE, *_CALL_MARKS, EOS), (*_CALL_MARKS, EOS)
_BLOCK_MARKS, _BODY_MARKS = (INVOKE, CALLS_CLOSE, EOS), (PARAMETER, INVOKE_CLOSE, CALLS_CLOSE, EOS)
_VALUE_MARKS = (PARAMETER_CLOSE, *_after_lines(PARAMETER, 1), *_after_lines(INVOKE_CLOSE, 1), EOS)


def decode(text: str, thinking: bool | None = None, calls_before: int = 0) -> dict[str, Any]:
    """The message that a reply's text stands for.

    Args:
        text: what the model wrote behind `encode`'s text; EOS may be missing.
        thinking: as it was for `encode`. Without it the text is taken to begin with reasoning if `<think>`
            begins or `</think>` ends one.
        calls_before: how many calls the conversation has had, from which ids count on.

    Returns:
        `role`, `content`, `reasoning_content` (both empty where there is none) and `tool_calls`, a list.

    Raises MessageError for a call that cannot be read, see the module, and for what is no text.
    """
    if not isinstance(text, str):
        raise MessageError(f"a reply is a {type(text).__name__}; give decode text")
    if thinking is None:
        before_calls = text[: min((text + mark).find(mark) for mark in (CALLS_OPEN, INVOKE))]
        thinking = text.startswith(THINK_OPEN) or THINK_CLOSE in before_calls
    parser = ReplyParser(thinking, calls_before)
    return joined([*parser.feed(text), *parser.close()])


def joined(deltas: Iterable[Delta]) -> dict[str, Any]:
    """The message that deltas of one reply add up to."""
    said: dict[str, list[str]] = {"content": [], "reasoning_content": []}
    calls: list[tuple[dict[str, Any], list[str]]] = []
    for delta in deltas:
        for key in said.keys() & delta.keys():
            said[key].append(delta[key])
        for call in delta.get("tool_calls", ()):
            if "id" in call:
                calls.append((call, []))
            calls[-1][1].append(call["function"]["arguments"])
    return {
        "role": "assistant",
        **{key: "".join(texts) for key, texts in said.items()},
        "tool_calls": [_whole_call(call, arguments) for call, arguments in calls],
    }


def _whole_call(begun: dict[str, Any], arguments: Sequence[str]) -> dict[str, Any]:
    function = {**begun["function"], "arguments": "".join(arguments)}
    return {"id": begun["id"], "type": begun["type"], "function": function}


class ReplyParser:
    """Reads a reply that comes in pieces, cut anywhere. `feed` each, then `close`.

    The deltas add up to what `decode` returns for the whole text. A call is begun when its name is known, and
    its arguments grow as they come, and a MessageError may follow: a call stands when the reply has ended.

    Args:
        thinking: whether the reply begins with reasoning.
        calls_before: how many calls the conversation has had, from which ids count on.
    """

    def __init__(self, thinking: bool, calls_before: int = 0) -> None:
        self._held, self._deltas, self._body = "", list[Delta](), list[str]()
        self._calls, self._calls_before = 0, calls_before
        self._names: set[str] = set()
        self._state: Callable[[], bool] = self._before_thinking if thinking else self._content

    def feed(self, piece: str) -> list[Delta]:
        """What a piece adds. Raises MessageError for a call that cannot be read."""
        self._held += piece
        while self._state():
            pass
        return self.take()

    def close(self) -> list[Delta]:
        """What was held back, when nothing comes any more. Raises MessageError within a call."""
        if self._state == self._block:
            self._end_block(self._held)
        elif self._state in (self._content, self._thinking, self._before_thinking):
            self._say("content" if self._state == self._content else "reasoning_content", self._held)
        elif self._state != self._ended:
            raise _unreadable("it ends within a call")
        self._state, self._held = self._ended, ""
        return self.take()

    def take(self) -> list[Delta]:
        """What was read and is not returned yet: after a MessageError what came before it."""
        deltas, self._deltas = self._deltas, []
        return deltas

    # States: each takes what it can from the held text, and says whether another may follow at once.

    def _before_thinking(self) -> bool:
        if len(self._held) < len(THINK_OPEN) and THINK_OPEN.startswith(self._held):
            return False
        self._held = self._held.removeprefix(THINK_OPEN)
        return self._go(self._thinking)

    def _thinking(self) -> bool:
        text, mark = self._take(_THINKING_MARKS)
        self._say("reasoning_content", text)
        return self._go(self._content) if mark == THINK_CLOSE else self._leave_text(mark)

    def _content(self) -> bool:
        text, mark = self._take(_CONTENT_MARKS)
        self._say("content", text)
        return self._leave_text(mark)

    def _block(self) -> bool:
        text, mark = self._take(_BLOCK_MARKS)
        _check_blank(text)
        if mark == INVOKE:
            return self._go(self._invoke_tag)
        if mark is not None:
            self._end_block("")
            return self._go(self._ended)
        return False

    def _invoke_tag(self) -> bool:
        if (tag := self._take_tag(_INVOKE_TAG)) is None:
            return False
        call_id = f"call_{self._calls_before + self._calls}"
        function = {"name": tag[1], "arguments": ""}
        call = {"index": self._calls, "id": call_id, "type": "function", "function": function}
        self._deltas.append({"tool_calls": [call]})
        self._names, self._body = set(), []
        return self._go(self._invoke_body)

    def _invoke_body(self) -> bool:
        text, mark = self._take(_BODY_MARKS)
        self._body.append(text)
        if mark is None:
            return False
        if mark == EOS:
            raise _unreadable("it ends within a call")
        if mark == PARAMETER:
            _check_blank("".join(self._body))
            return self._go(self._parameter_tag)
        self._end_call("".join(self._body).strip())
        if mark == CALLS_CLOSE:
            return self._go(self._ended)
        return self._go(self._block)

    def _parameter_tag(self) -> bool:
        if (tag := self._take_tag(_PARAMETER_TAG)) is None:
            return False
        name, is_string = tag[1], tag[2] == "true"
        if name in self._names:
            raise _unreadable(f"parameter {name!r:.80} is given twice")
        self._argue((", " if self._names else "{") + _json(name) + ": " + ('"' if is_string else ""))
        self._names.add(name)
        self._body = []
        return self._go(self._string if is_string else self._value)

    def _string(self) -> bool:
        text, mark = self._take(_VALUE_MARKS)
        self._argue(_json(text)[1:-1])
        if mark is not None:
            self._argue('"')
        return self._leave_value(mark)

    def _value(self) -> bool:
        text, mark = self._take(_VALUE_MARKS)
        self._body.append(text)
        if mark is not None:
            value = "".join(self._body)
            is_json = _is_json(value)
            if not is_json and (rest := _REST_OF_TAG.search(value)):
                raise _unreadable(f"a name goes on to {value[: rest.end()]!r:.80}")
            self._argue(value if is_json else _json(value))
        return self._leave_value(mark)

    def _ended(self) -> bool:
        self._held = ""
        return False

    # Steps of the states.

    def _go(self, state: Callable[[], bool]) -> bool:
        self._state = state
        return True

    def _leave_text(self, mark: str | None) -> bool:
        """On from content or thinking."""
        if mark is None:
            return False
        if mark == EOS:
            return self._go(self._ended)
        return self._go(self._block if mark.endswith(CALLS_OPEN) else self._invoke_tag)

    def _leave_value(self, mark: str | None) -> bool:
        """On from a parameter, whose end may be missing."""
        if mark is None:
            return False
        if mark == EOS:
            raise _unreadable("it ends within a call")
        self._body = []
        if mark.endswith(INVOKE_CLOSE):
            self._held = INVOKE_CLOSE + self._held
        return self._go(self._parameter_tag if mark.endswith(PARAMETER) else self._invoke_body)

    def _end_call(self, body: str) -> None:
        """Close the arguments; a body without parameters may be them."""
        if not self._names and body.startswith("{") and _is_json(body):
            self._argue(body)
        else:
            _check_blank(body)
            self._argue("}" if self._names else "{}")
        self._calls += 1

    def _end_block(self, rest: str) -> None:
        """Raises MessageError without a call, or for more than a beginning of the block's end."""
        if not (rest.startswith("</") and CALLS_CLOSE.startswith(rest)):
            _check_blank(rest)
        if not self._calls:
            raise _unreadable("a block has no call")

    def _say(self, key: str, text: str) -> None:
        if text:
            self._deltas.append({key: text})

    def _argue(self, text: str) -> None:
        """Add to the arguments of the call under way."""
        if text:
            call = {"index": self._calls, "function": {"arguments": text}}
            self._deltas.append({"tool_calls": [call]})

    def _take(self, marks: Sequence[str]) -> tuple[str, str | None]:
        """The held text before the first mark, and the mark, both taken; or all that can be part of none."""
        places = [(place, mark) for mark in marks if (place := self._held.find(mark)) >= 0]
        if places:
            place, mark = min(places)
            text, self._held = self._held[:place], self._held[place + len(mark) :]
            return text, mark
        stop = _start_of_mark(self._held, marks)
        text, self._held = self._held[:stop], self._held[stop:]
        return text, None

    def _take_tag(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        """The rest of a tag, taken; None as long as it is incomplete."""
        if (tag := pattern.match(self._held, 0, MAX_TAG)) is None:
            if other := _ANY_TAG.match(self._held, 0, MAX_TAG):
                raise _unreadable(f"a tag is {other[0]!r:.80}")
            if len(self._held) >= MAX_TAG:
                raise _unreadable(f"a tag does not end: {self._held[:40]!r}")
            return None
        self._held = self._held[tag.end() :]
        return tag


def _start_of_mark(text: str, marks: Sequence[str]) -> int:
    """Where a mark may have begun whose rest is still to come; the text's length if none has."""
    for start in range(max(0, len(text) - max(map(len, marks)) + 1), len(text)):
        if text[start] in "\n<" and any(mark.startswith(text[start:]) for mark in marks):
            return start
    return len(text)


def _is_json(text: str) -> bool:
    """Whether `encode` can write it again: Python's NaN and numbers too large for a float it cannot."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is Python's, not JSON's")

    try:
        json.dumps(json.loads(text, parse_constant=refuse), allow_nan=False)
    except (ValueError, RecursionError):
        return False
    return True


def _json(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _check_blank(text: str) -> None:
    if text.strip():
        raise _unreadable(f"{text.strip()[:40]!r} stands where a call should be")


def _unreadable(why: str) -> MessageError:
    return MessageError(f"the reply has a call that cannot be read: {why}; ask again, with room for it all")
