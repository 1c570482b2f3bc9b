"""A plain loop of chat and tool calls, until the model answers or a limit is reached.

What keeps the history within the context is for the chat to do: fulmen's gateway by `fulmen_context`, or a
function that applies one of `fulmen.agents.strategies` to what it is given.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fulmen.messages.message import Message, calls_of, text_of

# The tool that ends a run.
ANSWER = "answer"
ANSWER_TOOL: Mapping[str, Any] = {
    "type": "function",
    "function": {
        "name": ANSWER,
        "description": "Give the answer.",
        "parameters": {
            "type": "object",
            "properties": {"answer": {"type": "string"}},
            "required": ["answer"],
            "additionalProperties": False,
        },
    },
}
NO_CALL = "Call a tool."

# The model's next message. The choice is OpenAI's `tool_choice`: any call, or one of `answer`.
Chat = Callable[[Sequence[Message], Sequence[Mapping[str, Any]], Any], Message]
# A tool's result as text, also for what is wrong with the call.
RunTool = Callable[[str, Mapping[str, Any]], str]


@dataclass(frozen=True)
class AgentRun:
    """What an agent did.

    Attributes:
        messages: all of them, with the last reply.
        answer: None where there is none.
        steps: replies of the model.
    """

    messages: tuple[Message, ...]
    answer: str | None
    steps: int


def run_agent(
    chat: Chat,
    run_tool: RunTool,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]],
    max_steps: int = 20,
    result_limit: int = 10_000,
) -> AgentRun:
    """Let a model call tools until it calls `answer`; in the last step nothing else is asked for.

    Args:
        chat: the model.
        run_tool: runs one call; what it raises ends the run.
        messages: what the run begins with.
        tools: in OpenAI's shape; `answer` is added.
        max_steps: replies of the model at most.
        result_limit: letters of a result; the rest is left out, and said to be.
    """
    history, offered = list(messages), [*tools, ANSWER_TOOL]
    for step in range(1, max_steps + 1):
        is_last = step == max_steps
        choice = {"type": "function", "function": {"name": ANSWER}} if is_last else "required"
        reply = _sendable(chat(history, offered, choice))
        history.append(reply)
        if (answer := answer_in(reply)) is not None:
            return AgentRun(tuple(history), answer, step)
        if not is_last:
            history += _results(reply, run_tool, result_limit)
    return AgentRun(tuple(history), None, max_steps)


def answer_in(reply: Message) -> str | None:
    """The answer that a reply gives by a call of `answer`, or by text without any call."""
    for call in calls_of(reply):
        if call["function"].get("name") == ANSWER:
            return str(_arguments(call).get("answer", ""))
    text = text_of(reply, "a reply").strip()
    return text if text and not calls_of(reply) else None


def _sendable(reply: Message) -> Message:
    """A reply that servers take back: what is no JSON object in a call's arguments is an empty one."""
    if not (calls := calls_of(reply)):
        return reply
    read = [
        {**call, "function": {**call["function"], "arguments": json.dumps(_arguments(call))}}
        for call in calls
    ]
    return {**reply, "tool_calls": read}


def _results(reply: Message, run_tool: RunTool, limit: int) -> list[Message]:
    if not (calls := calls_of(reply)):
        return [{"role": "user", "content": NO_CALL}]
    results: list[Message] = []
    for call in calls:
        result = run_tool(str(call["function"].get("name")), _arguments(call))
        if len(result) > limit:
            result = f"{result[:limit]}\n[{len(result) - limit:,} more letters are left out]"
        results.append({"role": "tool", "tool_call_id": call["id"], "content": result})
    return results


def _arguments(call: Mapping[str, Any]) -> Mapping[str, Any]:
    """A call's arguments; none where a model wrote no JSON object."""
    try:
        read = json.loads(call["function"].get("arguments") or "{}")
    except ValueError:
        return {}
    return read if isinstance(read, dict) else {}
