"""An Anthropic message put together from the engine's stream, for clients that do not stream.

vLLM fails on a whole message with a call whose arguments are no object, and blames the request. In its stream
they come as the model wrote them.
"""

import json
from typing import Any

from fulmen.serving.gateway.dialects.anthropic import AnthropicDialect, noted
from fulmen.serving.gateway.dialects.base import Event

# A piece of a block: the field of the delta that has it, and the block's own.
_PIECES = {"text_delta": "text", "thinking_delta": "thinking", "signature_delta": "signature"}


class AssembledMessage(AnthropicDialect):
    """Reads a stream of messages; all that goes to the client is the message at the end."""

    def __init__(self) -> None:
        super().__init__()
        self._message: dict[str, Any] = {}
        self._blocks: list[dict[str, Any]] = []
        self._arguments: list[str] = []

    def feed(self, event: Event) -> bytes:
        """As `Dialect`."""
        super().feed(event)
        said = json.loads(event.data) if event.data != "[DONE]" else {}
        kind = said.get("type")
        if kind == "message_start":
            self._message = said["message"]
        elif kind == "content_block_start":
            self._blocks.append(said["content_block"])
            self._arguments.append("")
        elif kind == "content_block_delta":
            self._add(said["delta"])
        elif kind == "message_delta":
            self._message |= said["delta"] | {"usage": said["usage"]}
        return b""

    def tail(self, bill: dict[str, Any]) -> bytes:
        """As `Dialect`."""
        for block, arguments in zip(self._blocks, self._arguments, strict=True):
            if block["type"] == "tool_use":
                block["input"] = _object(arguments)
        shown = [block for block in self._blocks if block.get("text") != ""]
        content = shown or [{"type": "text", "text": ""}]
        return json.dumps(noted(self._message, bill) | {"content": content}, ensure_ascii=False).encode()

    def _add(self, delta: dict[str, Any]) -> None:
        if delta["type"] == "input_json_delta":
            self._arguments[-1] += delta["partial_json"]
        elif (field := _PIECES.get(delta["type"])) is not None:
            self._blocks[-1][field] = self._blocks[-1].get(field, "") + delta[field]


def _object(arguments: str) -> dict[str, Any]:
    """What a call was made with; nothing if the model wrote no object, or was cut short."""
    try:
        read = json.loads(arguments)
    except ValueError:
        return {}
    return read if isinstance(read, dict) else {}
