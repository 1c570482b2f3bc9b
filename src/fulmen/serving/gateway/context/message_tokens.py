"""How many tokens messages take in a prompt, counted message by message with the served tokenizer.

A message's share is what it adds to a short prompt of the model's template, or of V3.2's encoding. Shares are
remembered, so that a history that has grown by a step costs the count of that step. Their sum is the prompt's
own count, but for a few tokens where the template joins messages; it is seldom less.
"""

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fulmen.errors import MessageError
from fulmen.messages.encoding import encode
from fulmen.messages.message import Message
from fulmen.messages.strategies import SUMMARY_NAME
from fulmen.modeling.checkpoint import find_source, load_tokenizer
from fulmen.serving.engine.served_model import ServedModel

# Shares that are remembered, some hundred bytes each.
REMEMBERED = 100_000
# What may stand around a message that the template does not write alone.
AROUND = 16
Tools = Sequence[Mapping[str, Any]]
_USER: Message = {"role": "user", "content": "x"}
_REPLY: Message = {"role": "assistant", "content": "x"}
_CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "x", "arguments": "{}"}}
# What a message of each role is put behind.
_BEFORE: dict[str, tuple[Message, ...]] = {
    "assistant": (_USER,),
    "user": (_USER, _REPLY),
    "developer": (_USER, _REPLY),
    "tool": (_USER, {"role": "assistant", "content": "", "tool_calls": [_CALL]}),
}


class MessageTokens:
    """The shares of messages, for one served model, whose tokenizer is read when first needed."""

    def __init__(self, model: ServedModel) -> None:
        self._model, self._tokenizer = model, None
        self._shares: OrderedDict[int, int] = OrderedDict()
        self._lock = threading.Lock()

    def counter(self, tools: Tools) -> Callable[[Sequence[Message]], int]:
        """A function that counts the tokens of a prompt with these tools, for `fulmen.messages.strategies`.

        It knows the messages of its last call by their identity; a history that goes on is not read again.
        """
        opening = self._opening(tools)
        # With the messages themselves, so that none ends and leaves its identity to another.
        known: dict[int, tuple[Message, int]] = {}

        def count(messages: Sequence[Message]) -> int:
            nonlocal known
            known = {
                id(message): known.get(id(message)) or (message, self.share(message)) for message in messages
            }
            return opening + sum(known[id(message)][1] for message in messages)

        return count

    def share(self, message: Message) -> int:
        """Tokens that a message adds to a prompt."""
        return self._remembered(_key(message), lambda: self._share(message))

    def _opening(self, tools: Tools) -> int:
        """What a prompt has besides the messages: tools, a default system message, the reply's beginning."""
        key = hash(json.dumps(tools, sort_keys=True))
        return self._remembered(key, lambda: self._opening_of(tools))

    def _opening_of(self, tools: Tools) -> int:
        try:
            return self._tokens([_USER], tools, reply=True) - self.share(_USER)
        except MessageError:
            return self._text_tokens(json.dumps(tools, ensure_ascii=False)) + AROUND

    def _remembered(self, key: int, counted: Callable[[], int]) -> int:
        with self._lock:
            if (found := self._shares.get(key)) is not None:
                self._shares.move_to_end(key)
                return found
        found = counted()
        with self._lock:
            self._shares[key] = found
            while len(self._shares) > REMEMBERED:
                self._shares.popitem(last=False)
        return found

    def _share(self, message: Message) -> int:
        role = message["role"]
        if message.get("name") == SUMMARY_NAME and (text := message["content"]):
            # It is written anew each time, with the same lines and some more. A line's end is counted with
            # what follows it: at the end of a text tokenizers join it to spaces before it.
            lines = re.split(r"(?=\n)", text)
            return self.share({**message, "content": ""}) + sum(map(self._line, lines))
        try:
            if role == "system":
                return self._tokens([message, _USER]) - self._lead("assistant")
            if role == "tool":
                message = {**message, "tool_call_id": _CALL["id"]}
            return self._tokens([*_BEFORE[role], message]) - self._lead(role)
        except MessageError:
            return self._text_tokens(json.dumps(message, ensure_ascii=False)) + AROUND

    def _line(self, line: str) -> int:
        return self._remembered(hash(("line", line)), lambda: self._text_tokens(line))

    def _lead(self, role: str) -> int:
        """Tokens of what a message of a role is put behind."""
        return self._remembered(hash(role), lambda: self._tokens(_BEFORE[role]))

    def _tokens(self, messages: Sequence[Message], tools: Tools = (), reply: bool = False) -> int:
        """Tokens of a prompt. Raises MessageError where the template refuses the messages."""
        if self._model.chat_encoding:
            # Thoughts that are left out once the user speaks again are counted all the same.
            return self._text_tokens(encode(messages, tools, thinking="reasoning_content" in messages[-1]))
        try:
            text = self._read_tokenizer().apply_chat_template(
                list(messages), tools=list(tools) or None, tokenize=False, add_generation_prompt=reply
            )
        except Exception as error:  # templates are programs, and raise what they like
            raise MessageError(f"the template does not take these messages: {error}") from error
        return self._text_tokens(text)

    def _text_tokens(self, text: str) -> int:
        return len(self._read_tokenizer().backend_tokenizer.encode(text, add_special_tokens=False))

    def _read_tokenizer(self) -> Any:
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(find_source(str(self._model.place)))
        return self._tokenizer


def _key(message: Message) -> int:
    """Of all that is written of a message; Python's own hash, whose seed no client knows."""
    content = message.get("content")
    calls = message.get("tool_calls")
    return hash(
        (
            message["role"],
            content if isinstance(content, str) else json.dumps(content),
            message.get("reasoning_content"),
            message.get("name"),
            json.dumps(calls) if calls else None,
        )
    )
