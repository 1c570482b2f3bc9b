"""Anthropic's API: messages in the engine's words, its answers in Anthropic's, and what a model is called."""

import json
from typing import Any

from fulmen.serving.engine.served_model import ServedModel
from fulmen.serving.engine.settings import thinks
from fulmen.serving.gateway.dialects.base import Event, event_bytes
from fulmen.serving.gateway.dialects.deepseek import ALIASES
from fulmen.serving.gateway.dialects.requests import CountTokensRequest, MessagesRequest
from fulmen.serving.gateway.errors import ApiError, engine_error
from fulmen.serving.gateway.schemas.forced_calls import enforce_messages
from fulmen.serving.gateway.usage import UsageCounter

# Clients made for Anthropic's models have such names built in, some for small tasks beside the one chosen.
CLAUDE = "claude-"
# Anthropic's word for a date that is not known.
UNDATED = "1970-01-01T00:00:00Z"


def messages_body(request: MessagesRequest, model: ServedModel, salt: str) -> dict[str, Any]:
    """The engine's body for messages. Raises ApiError for what cannot be, naming the field."""
    budget = request.thinking.budget_tokens if request.thinking else None
    if budget is not None and budget >= request.max_tokens:
        field = "thinking.budget_tokens"
        raise ApiError(422, f"{field}={budget} must be less than max_tokens={request.max_tokens}", field)
    return _body(request, model) | {"cache_salt": salt}


def count_body(request: CountTokensRequest, model: ServedModel) -> dict[str, Any]:
    """The engine's body for a count of tokens. Raises ApiError as `messages_body`."""
    if request.fulmen_context is not None:
        field = "fulmen_context"
        raise ApiError(422, f"{field} is for requests that are answered; leave it out", field)
    return _body(request, model)


def _body(request: CountTokensRequest, model: ServedModel) -> dict[str, Any]:
    require_known(request.model, model)
    if model.chat_encoding:
        raise ApiError(
            400,
            f"{model.name} is served in DeepSeek-V3.2's chat encoding, which messages of this API are not "
            "written in; use /v1/chat/completions or /v1/responses",
            "messages",
        )
    body = request.model_dump(exclude_none=True, exclude={"fulmen_context"}) | {"model": model.name}
    if (thinking := request.thinking) is not None:
        body["thinking"] = _engine_thinking(thinking.type, thinking.budget_tokens, model)
        if model.chat_template:
            wanted = thinking.type != "disabled"
            body["chat_template_kwargs"] = {"thinking": wanted, "enable_thinking": wanted}
    enforce_messages(body)
    return body


def require_known(name: str, model: ServedModel) -> None:
    """Raise ApiError 404 unless the name is the model's, one of DeepSeek's, or one of Anthropic's models."""
    if name != model.name and name not in ALIASES and not name.startswith(CLAUDE):
        raise ApiError(404, f"model={name[:80]!r} does not exist; this server has {model.name}", "model")


def model_info(model: ServedModel, context: int) -> dict[str, Any]:
    """The model as Anthropic describes one; `context`: tokens of prompt and answer."""
    return {
        "type": "model",
        "id": model.name,
        "display_name": model.name,
        "created_at": UNDATED,
        "lifecycle": "active",
        "max_input_tokens": context,
        "max_tokens": context,
    }


def model_list(model: ServedModel, context: int) -> dict[str, Any]:
    """The one model, on the one page."""
    return {
        "data": [model_info(model, context)],
        "has_more": False,
        "first_id": model.name,
        "last_id": model.name,
    }


class AnthropicDialect:
    """Messages."""

    def __init__(self) -> None:
        self.usage = UsageCounter()
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
            counted = {"prompt_tokens": self.usage.prompt, "completion_tokens": self.usage.output + 1}
            self.usage.note(0, counted)
        elif event.name == "message_delta":
            self.usage.finish_anthropic(said.get("usage") or {})
        if self._held or event.name == "message_delta":
            self._held.append(event)
            return b""
        return event_bytes(event)

    def tail(self, bill: dict[str, Any]) -> bytes:
        """As `Dialect`; of the bill clients get what a strategy did, which must not go unsaid."""
        return b"".join(event_bytes(_noted_event(event, bill)) for event in self._held)

    def read_plain(self, answer: dict[str, Any]) -> None:
        """As `Dialect`."""
        self.usage.finish_anthropic(answer.get("usage") or {})

    def plain(self, answer: dict[str, Any], bill: dict[str, Any]) -> dict[str, Any]:
        """As `Dialect`."""
        return noted(answer, bill)

    def broken(self, error: ApiError) -> bytes:
        """As `Dialect`."""
        return event_bytes(Event("error", json.dumps(error.anthropic_body)))


def noted(answer: dict[str, Any], bill: dict[str, Any]) -> dict[str, Any]:
    """What has a `usage`, with what a strategy did in it, if there was one."""
    if "context" not in bill:
        return answer
    usage = answer.get("usage") or {}
    return answer | {"usage": usage | {"fulmen": {"context": bill["context"]}}}


def _noted_event(event: Event, bill: dict[str, Any]) -> Event:
    if event.name != "message_delta" or "context" not in bill:
        return event
    return event._replace(data=json.dumps(noted(json.loads(event.data), bill)))


def _engine_thinking(kind: str, budget: int | None, model: ServedModel) -> dict[str, Any]:
    """The engine ends thoughts at the budget. It refuses one for a model that has no thoughts to end."""
    if kind != "enabled":
        return {"type": kind}
    if budget is None or not thinks(model):
        return {"type": "adaptive"}
    return {"type": "enabled", "budget_tokens": budget}
