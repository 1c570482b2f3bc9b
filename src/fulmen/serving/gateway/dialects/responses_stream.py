"""A chat's answer as OpenAI's Responses API tells it: a response of items, whole or in events."""

import json
import time
from typing import Any

from fulmen.serving.gateway.dialects.base import Event
from fulmen.serving.gateway.dialects.openai import chat_chunk
from fulmen.serving.gateway.dialects.responses import ResponsesRequest
from fulmen.serving.gateway.errors import ApiError
from fulmen.serving.gateway.usage import UsageCounter


class Items:
    """The answer's items, as its pieces come; what is to be said of each piece lies in `events`."""

    def __init__(self, identity: str) -> None:
        self.done: list[dict[str, Any]] = []
        self.events: list[dict[str, Any]] = []
        self._id = identity
        self._open: dict[str, Any] | None = None
        self._call: int | None = None

    def add(self, delta: dict[str, Any]) -> None:
        """A piece of a chat's message: thoughts, text, calls."""
        if thought := delta.get("reasoning") or delta.get("reasoning_content"):
            self._write("reasoning", "reasoning_text", thought)
        if text := delta.get("content"):
            self._write("message", "output_text", text)
        for place, call in enumerate(delta.get("tool_calls") or []):
            self._write_call(call.get("index", place), call)

    def close(self, status: str = "completed") -> None:
        """The open item has ended."""
        if (item := self._open) is None:
            return
        item["status"] = status
        if item["type"] == "function_call":
            self._say("function_call_arguments.done", item, arguments=item["arguments"], name=item["name"])
        else:
            (part,) = item["content"]
            self._say(f"{part['type']}.done", item, content_index=0, text=part["text"], **_extras(part))
            self._say("content_part.done", item, content_index=0, part=part)
        self.done.append(item)
        self.events.append(self._event("output_item.done", len(self.done) - 1, item=item))
        self._open = self._call = None

    def _write(self, kind: str, part_kind: str, text: str) -> None:
        if self._open is None or self._open["type"] != kind:
            self.close()
            own: dict[str, Any] = {"role": "assistant"} if kind == "message" else {"summary": []}
            item = self._begin({"type": kind, **own, "content": []})
            part: dict[str, Any] = {"type": part_kind, "text": ""}
            if part_kind == "output_text":
                part |= {"annotations": [], "logprobs": []}
            self._say("content_part.added", item, content_index=0, part=dict(part))
            item["content"].append(part)
        assert self._open is not None
        part = self._open["content"][0]
        part["text"] += text
        self._say(f"{part_kind}.delta", self._open, content_index=0, delta=text, **_extras(part))

    def _write_call(self, index: int, call: dict[str, Any]) -> None:
        function = call.get("function") or {}
        if self._call != index:
            self.close()
            identity = call.get("id") or f"call_{self._id}_{index}"
            call_item = {"type": "function_call", "call_id": identity, "name": function.get("name") or ""}
            self._begin({**call_item, "arguments": ""})
            self._call = index
        assert self._open is not None
        if arguments := function.get("arguments"):
            self._open["arguments"] += arguments
            self._say("function_call_arguments.delta", self._open, delta=arguments)

    def _begin(self, fields: dict[str, Any]) -> dict[str, Any]:
        prefix = {"message": "msg", "reasoning": "rs", "function_call": "fc"}[fields["type"]]
        self._open = {"id": f"{prefix}_{self._id}_{len(self.done)}", "status": "in_progress", **fields}
        self.events.append(self._event("output_item.added", len(self.done), item=_copy(self._open)))
        return self._open

    def _say(self, kind: str, item: dict[str, Any], **fields: Any) -> None:
        self.events.append(self._event(kind, len(self.done), item_id=item["id"], **_copy(fields)))

    def _event(self, kind: str, place: int, **fields: Any) -> dict[str, Any]:
        return {"type": f"response.{kind}", "output_index": place, **fields}


class ResponsesDialect:
    """Reads a chat; see `Dialect`."""

    def __init__(self, request: ResponsesRequest, model: str, identity: str) -> None:
        self.usage = UsageCounter()
        self._items = Items(identity)
        self._finish: str | None = None
        self._said = 0
        self._about = _about(request, model, identity)

    def feed(self, event: Event) -> bytes:
        """As `Dialect`. Raises ApiError for an error that the engine streams."""
        chunk = chat_chunk(event)
        if chunk is None:
            return b""
        begun = b"" if self._said else self._begin()
        usage, choices = chunk.get("usage") or {}, chunk["choices"]
        if not choices:
            self.usage.finish(usage)
            return begun
        if usage:
            self.usage.note(0, usage)
        self._items.add(choices[0].get("delta") or {})
        self._finish = choices[0].get("finish_reason") or self._finish
        return begun + self._take()

    def tail(self, bill: dict[str, Any]) -> bytes:
        """As `Dialect`."""
        self._end()
        kind = "incomplete" if self._incomplete else "completed"
        return self._take() + self._tell({"type": f"response.{kind}", "response": self._response(bill)})

    def read_plain(self, answer: dict[str, Any]) -> None:
        """As `Dialect`."""
        self.usage.finish(answer.get("usage") or {})

    def plain(self, answer: dict[str, Any], bill: dict[str, Any]) -> dict[str, Any]:
        """As `Dialect`."""
        choice = answer["choices"][0]
        self._items.add(choice["message"])
        self._finish = choice.get("finish_reason")
        self._end()
        return self._response(bill)

    def broken(self, error: ApiError) -> bytes:
        """As `Dialect`."""
        said = {"code": error.body["error"]["code"], "message": error.message, "param": error.param}
        # Of the codes that clients know, the one that fits: it was not the request.
        why = {"code": "server_error", "message": error.message}
        failed = self._about | {"status": "failed", "output": self._items.done, "error": why}
        return self._tell({"type": "error", **said}) + self._tell(
            {"type": "response.failed", "response": failed}
        )

    @property
    def _incomplete(self) -> bool:
        return self._finish == "length"

    def _begin(self) -> bytes:
        kinds = ("response.created", "response.in_progress")
        return b"".join(self._tell({"type": kind, "response": self._about}) for kind in kinds)

    def _end(self) -> None:
        self._items.close("incomplete" if self._incomplete else "completed")

    def _take(self) -> bytes:
        events, self._items.events = self._items.events, []
        return b"".join(map(self._tell, events))

    def _tell(self, event: dict[str, Any]) -> bytes:
        text = json.dumps({**event, "sequence_number": self._said}, ensure_ascii=False, separators=(",", ":"))
        self._said += 1
        return f"event: {event['type']}\ndata: {text}\n\n".encode()

    def _response(self, bill: dict[str, Any]) -> dict[str, Any]:
        hit, miss, output = self.usage.tokens
        usage = {
            "input_tokens": hit + miss,
            "input_tokens_details": {"cached_tokens": hit, "cache_write_tokens": 0},
            "output_tokens": output,
            "output_tokens_details": {"reasoning_tokens": self.usage.reasoning or 0},
            "total_tokens": hit + miss + output,
            "fulmen": bill,
        }
        why = {"reason": "max_output_tokens"} if self._incomplete else None
        status = "incomplete" if self._incomplete else "completed"
        ends = {"status": status, "incomplete_details": why, "output": self._items.done, "usage": usage}
        return self._about | ends


def _about(request: ResponsesRequest, model: str, identity: str) -> dict[str, Any]:
    """The response before anything of it has come."""
    asked = request.model_dump(by_alias=True, exclude_none=True)
    return {
        "id": f"resp_{identity}",
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "metadata": request.metadata or {},
        "model": model,
        "output": [],
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None, **asked.get("reasoning", {})},
        "store": False,
        "temperature": request.temperature,
        "text": {"format": {"type": "text"}, **asked.get("text", {})},
        "tool_choice": asked.get("tool_choice", "auto"),
        "tools": [{"parameters": None, "strict": None, **tool} for tool in asked.get("tools", [])],
        "top_p": request.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": request.user,
    }


def _extras(part: dict[str, Any]) -> dict[str, Any]:
    return {"logprobs": []} if part["type"] == "output_text" else {}


def _copy(value: dict[str, Any]) -> dict[str, Any]:
    """What is said now; the item goes on changing."""
    return json.loads(json.dumps(value))
