"""OpenAI's Responses API, asked of the engine as a chat: one way to check, constrain, meter and end requests.

Nothing is kept between requests, so that what refers to an earlier one is refused: the client sends the
conversation as `input`, as it does with `store: false`.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from fulmen.serving.gateway.dialects.requests import (
    ChatRequest,
    ContextOptions,
    Count,
    Model,
    ResponseFormat,
    Role,
    ToolName,
)
from fulmen.serving.gateway.errors import ApiError

# Fields that ask for what is not kept here, or not done.
_REFUSED = {
    "previous_response_id": "no answer is kept here; send the whole conversation as input",
    "conversation": "no conversation is kept here; send it as input",
    "background": "answers are not made in the background; leave it out, and stream",
    "prompt": "no prompts are kept here; send instructions and input",
}
_LOGPROBS = "message.output_text.logprobs"
# What chats call it, and what it is called here.
_FIELDS = (
    (re.compile(r"^messages\b.*"), "input"),
    (re.compile(r"^max_tokens\b"), "max_output_tokens"),
    (re.compile(r"^response_format\.json_schema\b"), "text.format"),
    (re.compile(r"^response_format\b"), "text.format"),
    (re.compile(r"^(tools\[\d+\])\.function\b"), r"\1"),
    (re.compile(r"^reasoning_effort\b"), "reasoning.effort"),
)


class Part(Model):
    type: Literal["input_text", "output_text", "text"]
    text: str


Text = str | list[Part]


class InputMessage(Model):
    role: Role
    content: Text


class InputCall(Model):
    call_id: str
    name: ToolName
    arguments: str


class InputOutput(Model):
    call_id: str
    output: Text


class ReasoningPart(Model):
    text: str


class InputReasoning(Model):
    content: list[ReasoningPart] | None = None


def _kind(item: Any) -> str:
    said = item.get("type", "message") if isinstance(item, dict) else item
    return _KINDS.get(said, "None") if isinstance(said, str) else "None"


_KINDS = {
    "message": "Message",
    "function_call": "Call",
    "function_call_output": "Output",
    "reasoning": "Reasoning",
}
Item = Annotated[
    Annotated[InputMessage, Tag("Message")]
    | Annotated[InputCall, Tag("Call")]
    | Annotated[InputOutput, Tag("Output")]
    | Annotated[InputReasoning, Tag("Reasoning")],
    Discriminator(
        _kind,
        custom_error_type="item",
        custom_error_message=f"an item's type must be one of {', '.join(_KINDS)}",
    ),
]


class FunctionTool(Model):
    type: Literal["function"]
    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedFunctionTool(Model):
    type: Literal["function"]
    name: ToolName


class Format(Model):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class TextSettings(Model):
    format: Format | None = None


class ReasoningSettings(Model):
    effort: Literal["none", "minimal", "low", "medium", "high"] | None = None


class ResponsesRequest(Model):
    """`POST /responses`."""

    model: str
    input: str | Annotated[list[Item], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedFunctionTool | None = None
    parallel_tool_calls: bool | None = None
    text: TextSettings | None = None
    reasoning: ReasoningSettings | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None
    stream: bool | None = None
    include: list[str] | None = None
    truncation: Literal["disabled"] | None = None
    previous_response_id: str | None = None
    conversation: str | dict[str, Any] | None = None
    background: bool | None = None
    prompt: dict[str, Any] | None = None
    fulmen_context: ContextOptions | None = None


def chat_of(request: ResponsesRequest) -> ChatRequest:
    """The same as a chat. Raises ApiError for what is not done here, naming the field."""
    for field, why in _REFUSED.items():
        if getattr(request, field):
            raise ApiError(400, f"{field}: {why}", field)
    if _LOGPROBS in (request.include or []):
        raise ApiError(400, f"include: {_LOGPROBS} is not given here; leave it out", "include")
    fields: dict[str, Any] = {
        "model": request.model,
        "messages": _messages(request),
        "max_tokens": request.max_output_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "tools": [_tool(tool) for tool in request.tools] if request.tools else None,
        "tool_choice": _choice(request.tool_choice) if request.tools else None,
        "parallel_tool_calls": request.parallel_tool_calls if request.tools else None,
        "response_format": _format(request.text),
        "reasoning_effort": request.reasoning.effort if request.reasoning else None,
        "stream": request.stream,
        "fulmen_context": request.fulmen_context,
    }
    return ChatRequest.model_validate(fields)


def in_our_words(error: ApiError) -> ApiError:
    """An error about the chat, with the field's name in this API."""
    if error.param is None:
        return error
    ours = error.param
    for pattern, name in _FIELDS:
        ours = pattern.sub(name, ours)
    return ApiError(error.status, error.message.replace(error.param, ours), ours)


def _messages(request: ResponsesRequest) -> list[dict[str, Any]]:
    items: list[Any] = request.input if isinstance(request.input, list) else []
    messages: list[dict[str, Any]] = [{"role": "user", "content": request.input}] if not items else []
    thoughts = None
    for item in items:
        if isinstance(item, InputReasoning):
            thoughts = "".join(part.text for part in item.content or []) or None
            continue
        message = _message(item, messages)
        if thoughts is not None and message["role"] == "assistant":
            message["reasoning_content"], thoughts = thoughts, None
        if not messages or messages[-1] is not message:
            messages.append(message)
    if not messages:
        raise ApiError(422, "input has no message, call or output; add one", "input")
    return _instructed(messages, request.instructions)


def _message(item: Any, before: list[dict[str, Any]]) -> dict[str, Any]:
    """The message of an item; a call belongs to the assistant's message before it, if there is one."""
    if isinstance(item, InputOutput):
        return {"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)}
    if isinstance(item, InputMessage):
        return {"role": item.role, "content": _text(item.content)}
    called = {"name": item.name, "arguments": item.arguments}
    call = {"id": item.call_id, "type": "function", "function": called}
    if before and before[-1]["role"] == "assistant":
        before[-1].setdefault("tool_calls", []).append(call)
        return before[-1]
    return {"role": "assistant", "tool_calls": [call]}


def _instructed(messages: list[dict[str, Any]], instructions: str | None) -> list[dict[str, Any]]:
    """With the instructions first; templates take one message of the system's at most."""
    if instructions is None:
        return messages
    system = {"role": "system", "content": instructions}
    if messages and messages[0]["role"] in ("system", "developer"):
        system["content"] += "\n\n" + messages.pop(0)["content"]
    return [system, *messages]


def _text(content: str | list[Part]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


def _tool(tool: FunctionTool) -> dict[str, Any]:
    return {"type": "function", "function": tool.model_dump(exclude={"type"})}


def _choice(choice: str | NamedFunctionTool | None) -> Any:
    if isinstance(choice, NamedFunctionTool):
        return {"type": "function", "function": {"name": choice.name}}
    return choice


def _format(text: TextSettings | None) -> ResponseFormat | None:
    if text is None or text.format is None:
        return None
    found = text.format
    if found.type != "json_schema":
        return ResponseFormat(type=found.type)
    schema = {"name": found.name or "answer", "strict": found.strict, "schema": found.schema_}
    return ResponseFormat.model_validate({"type": found.type, "json_schema": schema})
