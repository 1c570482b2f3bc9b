"""Anthropic's messages as a history that a strategy manages, and back: text, thoughts, calls, results.

Where a message of the user has results and words there, here each result is a message, as vLLM makes of them.
Pictures and other blocks no strategy knows; a request with some is refused, not managed by half.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from fulmen.messages.message import Message
from fulmen.serving.gateway.dialects.requests import ChatRequest, MessagesRequest
from fulmen.serving.gateway.errors import ApiError, validation_error


def chat_of_messages(request: MessagesRequest) -> ChatRequest:
    """What a strategy has to know of the request, in OpenAI's shape; a system prompt is its first message.

    Raises ApiError for messages that are not of text, thoughts, calls and results.
    """
    opening = [{"role": "system", "content": _text(request.system, "system")}] if request.system else []
    said = [
        part
        for place, message in enumerate(request.messages)
        for part in _parts(message, f"messages[{place}]")
    ]
    functions = [
        {
            "name": tool.get("name"),
            "description": tool.get("description"),
            "parameters": tool.get("input_schema"),
        }
        for tool in request.tools or ()
    ]
    fields = {
        "model": request.model,
        "max_tokens": request.max_tokens,
        "messages": [*opening, *said],
        "tools": [{"type": "function", "function": function} for function in functions] or None,
        "fulmen_context": request.fulmen_context,
    }
    try:
        return ChatRequest.model_validate(fields)
    except ValidationError as error:
        raise validation_error(error.errors()) from error


def messages_of_chat(request: MessagesRequest, chat: ChatRequest) -> MessagesRequest:
    """The request with the messages that were kept."""
    kept = [message.model_dump(exclude_none=True) for message in chat.messages]
    messages = [_message(one) for one in (kept[1:] if request.system else kept)]
    return request.model_copy(update={"messages": messages})


def _parts(message: Mapping[str, Any], place: str) -> Iterator[dict[str, Any]]:
    """The messages that one of Anthropic's is in OpenAI's shape: results, then the rest."""
    role, content = message.get("role"), message.get("content")
    if not isinstance(content, list):
        yield {"role": role, "content": content}
        return
    words: list[dict[str, str]] = []
    thoughts, calls = "", []
    for index, block in enumerate(content):
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "tool_result" and role == "user":
            text = _text(block.get("content") or "", f"{place}.content[{index}].content")
            yield {"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": text}
        elif kind == "tool_use" and role == "assistant":
            function = {"name": block.get("name"), "arguments": json.dumps(block.get("input") or {})}
            calls.append({"id": block.get("id"), "type": "function", "function": function})
        elif kind == "text":
            words.append({"type": "text", "text": block.get("text")})
        elif kind == "thinking":
            thoughts += str(block.get("thinking"))
        elif kind != "redacted_thinking":
            raise _unknown(f"{place}.content[{index}]", kind)
    if words or calls or thoughts:
        more = {"tool_calls": calls or None, "reasoning_content": thoughts or None}
        yield {"role": role, "content": words or None, **more}


def _text(content: Any, place: str) -> str:
    """A text, or text blocks joined as vLLM joins them."""
    if isinstance(content, str):
        return content
    for index, block in enumerate(content if isinstance(content, list) else [content]):
        if not isinstance(block, dict) or not isinstance(block.get("text"), str):
            raise _unknown(f"{place}[{index}]", block.get("type") if isinstance(block, dict) else None)
    return "\n".join(block["text"] for block in content)


def _unknown(place: str, kind: Any) -> ApiError:
    return ApiError(
        400,
        f"{place} is of type {kind!r:.80}, which no strategy can manage; send text, thinking, tool_use and "
        "tool_result, or no fulmen_context, with a key without a strategy",
        place,
    )


def _message(said: Message) -> dict[str, Any]:
    """One of Anthropic's messages."""
    if said["role"] == "tool":
        block = {"type": "tool_result", "tool_use_id": said["tool_call_id"], "content": said["content"]}
        return {"role": "user", "content": [block]}
    if said["role"] != "assistant":
        return {"role": said["role"], "content": said["content"]}
    thoughts, content = said.get("reasoning_content"), said.get("content") or []
    words = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return {
        "role": "assistant",
        "content": [
            *([{"type": "thinking", "thinking": thoughts, "signature": ""}] if thoughts else []),
            *words,
            *_calls(said.get("tool_calls") or ()),
        ],
    }


def _calls(calls: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    for call in calls:
        function = call["function"]
        given = json.loads(function["arguments"])
        yield {"type": "tool_use", "id": call["id"], "name": function["name"], "input": given}
