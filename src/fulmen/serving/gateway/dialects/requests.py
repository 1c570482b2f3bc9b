"""Requests as clients write them. What is not named here is not passed on to the engine."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from fulmen.messages.strategies import TRIGGER
from fulmen.serving.engine.settings import MOST_STOPS

Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
ToolName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")]
Stop = str | Annotated[list[str], Field(max_length=MOST_STOPS)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
TokenKey = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
Prompts = Annotated[list[str], Field(min_length=1, max_length=64)]
PromptIds = Annotated[list[TokenId], Field(min_length=1)]
Role = Literal["system", "user", "assistant", "tool", "developer"]


class Model(BaseModel):
    """Types are taken as written ("5" is no number); unknown fields are ignored, as DeepSeek does."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class TextPart(Model):
    type: Literal["text"]
    text: str


class CalledFunction(Model):
    name: str
    arguments: str


class ToolCall(Model):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Model):
    role: Role
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    prefix: bool | None = None


class Function(Model):
    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Model):
    type: Literal["function"]
    function: Function


class NamedFunction(Model):
    name: ToolName


class NamedTool(Model):
    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Model):
    name: str
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(Model):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StreamOptions(Model):
    include_usage: bool | None = None


class Thinking(Model):
    type: Literal["enabled", "disabled"]


class ContextOptions(Model):
    """How a history that outgrows the context is kept within it; see `fulmen.messages.strategies`."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    strategy: Literal["none", "summary", "discard_75", "discard_all", "keep_newest", "hierarchical"]
    trigger: Annotated[float, Field(ge=0, le=1)] = TRIGGER
    newest: Annotated[int, Field(ge=0, le=1000)] | None = None
    budget: Count | None = None


class Sampling(Model):
    """What chat and completions share."""

    model: str
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=2)] | None = None
    logit_bias: dict[TokenKey, Annotated[float, Field(ge=-100, le=100)]] | None = None
    seed: Seed | None = None
    stop: Stop | None = None
    n: Annotated[int, Field(ge=1, le=16)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None


class ChatRequest(Sampling):
    """`POST /chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    thinking: Thinking | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high"] | None = None
    fulmen_context: ContextOptions | None = None


class CompletionRequest(Sampling):
    """`POST /completions`; with `suffix`, fill in the middle."""

    prompt: str | Prompts | PromptIds
    suffix: str | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def texts(self) -> int:
        """How many prompts there are."""
        return len(self.prompt) if isinstance(self.prompt, list) and isinstance(self.prompt[0], str) else 1


class MessagesThinking(Model):
    """What Anthropic's clients say of thinking; `adaptive` leaves its length to the model."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[int, Field(ge=1024, le=2**31 - 1)] | None = None


class CountTokensRequest(Model):
    """`POST /anthropic/v1/messages/count_tokens`; the engine checks what is inside messages and tools."""

    model: str
    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    system: str | list[dict[str, Any]] | None = None
    thinking: MessagesThinking | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    fulmen_context: Any = None


class MessagesRequest(CountTokensRequest):
    """`POST /anthropic/v1/messages`."""

    max_tokens: Count
    fulmen_context: ContextOptions | None = None
    stop_sequences: Annotated[list[str], Field(max_length=MOST_STOPS)] | None = None
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
