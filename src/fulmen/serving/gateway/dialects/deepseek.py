"""What a request becomes before the engine reads it: DeepSeek's extras in vLLM's words."""

from copy import deepcopy
from typing import Any

from fulmen.serving.engine.served_model import ServedModel
from fulmen.serving.gateway.dialects.requests import ChatRequest, CompletionRequest, Message
from fulmen.serving.gateway.dialects.v32_chat import v32_body
from fulmen.serving.gateway.errors import ApiError
from fulmen.serving.gateway.schemas.forced_calls import enforce_chat

# DeepSeek's two names, for the examples in its documentation: the same model, without and with thinking.
ALIASES = {"deepseek-chat": False, "deepseek-reasoner": True}
# Consumed here; the engine would not know them or take them for something else.
_OURS = {"thinking", "stream_options", "suffix", "model", "fulmen_context"}
_STREAM_OPTIONS = {"include_usage": True, "continuous_usage_stats": True}


def chat_body(request: ChatRequest, model: ServedModel, salt: str) -> dict[str, Any]:
    """The engine's body for a chat. Raises ApiError for what cannot be, naming the field."""
    thinking = _thinking(request, model)
    _check_format(request)
    body = _plain(request) | {"model": model.name, "cache_salt": salt}
    body["messages"] = [_message(message) for message in request.messages]
    if thinking is not None:
        body["chat_template_kwargs"] = {"thinking": thinking, "enable_thinking": thinking}
        _check_thoughts(request.messages, thinking)
    is_prefixed = _prefixed(request.messages)
    if model.chat_encoding:
        offered = deepcopy(body.get("tools", []))
        enforce_chat(body)
        body["messages"][-1]["prefix"] = is_prefixed
        return v32_body(body, body["messages"], offered, bool(thinking))
    if is_prefixed:
        if model.speaks_v32:
            why = "prefix: vLLM's encoding for DeepSeek-V3.2 cannot continue a message; leave it out"
            raise ApiError(400, why, f"messages[{len(request.messages) - 1}].prefix")
        body |= {"continue_final_message": True, "add_generation_prompt": False}
    enforce_chat(body)
    return body


def completion_body(request: CompletionRequest, model: ServedModel, salt: str) -> dict[str, Any]:
    """The engine's body for a completion; a suffix is written with the tokenizer's own tokens."""
    _check_name(request.model, model)
    body = _plain(request) | {"model": model.name, "cache_salt": salt}
    if request.suffix is not None:
        if model.fim is None:
            raise ApiError(
                400, f"suffix: {model.name} has no tokens to fill in the middle; leave it out", "suffix"
            )
        if not isinstance(request.prompt, str):
            raise ApiError(400, "suffix needs a prompt that is one string", "prompt")
        body["prompt"] = model.fim.render(request.prompt, request.suffix)
    return body


def rename_reasoning(message: dict[str, Any]) -> None:
    """vLLM says `reasoning`, DeepSeek `reasoning_content`; a model that did not think has neither."""
    if (thought := message.pop("reasoning", None)) is not None:
        message["reasoning_content"] = thought


def _plain(request: ChatRequest | CompletionRequest) -> dict[str, Any]:
    body = request.model_dump(exclude_none=True, exclude=_OURS, by_alias=True)
    if request.stream:
        body["stream_options"] = _STREAM_OPTIONS
    return body


def _check_name(name: str, model: ServedModel) -> None:
    if name != model.name and name not in ALIASES:
        raise ApiError(400, f"model={name[:80]!r} does not exist; this server has {model.name}", "model")


def _thinking(request: ChatRequest, model: ServedModel) -> bool | None:
    """What the request says of thinking; None lets the model's template decide."""
    _check_name(request.model, model)
    if request.thinking is not None:
        return request.thinking.type == "enabled"
    return ALIASES.get(request.model)


def _message(message: Message) -> dict[str, Any]:
    body = message.model_dump(exclude_none=True, exclude={"prefix"})
    # Templates read the content of every message; a call of tools alone has none.
    return {"content": "", **body}


def _prefixed(messages: list[Message]) -> bool:
    for place, message in enumerate(messages):
        if message.prefix and (message.role != "assistant" or place < len(messages) - 1):
            field = f"messages[{place}].prefix"
            raise ApiError(400, f"{field} belongs to the last message, of the assistant", field)
    return bool(messages[-1].prefix)


def _check_thoughts(messages: list[Message], thinking: bool) -> None:
    """Within one turn a thinking model needs the thoughts that led to its tool calls."""
    users = [place for place, message in enumerate(messages) if message.role == "user"]
    turn = users[-1] + 1 if users else 0
    for place, message in enumerate(messages[turn:], start=turn):
        if thinking and message.tool_calls and message.reasoning_content is None:
            field = f"messages[{place}].reasoning_content"
            raise ApiError(400, f"{field} is missing; send back what came with the tool call", field)


def _check_format(request: ChatRequest) -> None:
    asked = request.response_format
    if asked is not None and asked.type == "json_schema":
        field = "response_format.json_schema"
        if asked.json_schema is None or asked.json_schema.schema_ is None:
            raise ApiError(422, f"{field}.schema is missing", field)
