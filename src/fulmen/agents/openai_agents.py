"""Strategies for the package openai-agents: a `call_model_input_filter`, on its plain data alone.

RunConfig(call_model_input_filter=input_filter(discard_all, budget=100_000, count=count))
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fulmen.errors import MessageError
from fulmen.messages.message import Message
from fulmen.messages.strategies import Counter, Strategy, at_every_call

# An item of OpenAI's Responses API, as openai-agents keeps its history.
Item = Mapping[str, Any]
_OF_A_REPLY = ("reasoning", "function_call")


def input_filter(strategy: Strategy, budget: int, count: Counter) -> Callable[[Any], Any]:
    """The filter of a run's configuration that applies a strategy before each call of the model.

    openai-agents gives the whole history each time: the strategy is applied by `at_every_call`. What it keeps
    are the items themselves, reasoning among them.

    Args:
        budget: tokens that a prompt may have.
        count: of messages in OpenAI's shape, the agent's instructions as a first system message; tools that
            stand in the prompt are for it to count. Messages have their `items` besides.

    The filter raises what the strategy does, and MessageError for an item of a hosted tool.
    """
    managed = at_every_call(strategy)

    def filtered(data: Any) -> Any:
        given = data.model_data
        instructions = [{"role": "system", "content": given.instructions}] if given.instructions else []
        kept = managed([*instructions, *messages_of(given.input)], budget, count)
        items = [item for message in kept[len(instructions) :] for item in items_of(message)]
        return dataclasses.replace(given, input=items)

    return filtered


def messages_of(items: Sequence[Item]) -> list[Message]:
    """Items as chat messages, each of which has those that it stands for under `items`.

    Raises MessageError for an item that is neither said, nor reasoning, nor a function's call or output.
    """
    messages: list[Message] = []
    is_reply = False
    for item in items:
        was_reply, is_reply = is_reply, item.get("role") == "assistant" or item.get("type") in _OF_A_REPLY
        if is_reply and was_reply:
            messages[-1] = _with_item(messages[-1], item)
        elif is_reply:
            messages.append(
                _with_item({"role": "assistant", "content": "", "tool_calls": [], "items": []}, item)
            )
        elif item.get("type") == "function_call_output":
            result = {"role": "tool", "tool_call_id": item["call_id"], "content": item["output"]}
            messages.append({**result, "items": [item]})
        elif item.get("type", "message") == "message":
            messages.append({"role": item.get("role"), "content": item.get("content"), "items": [item]})
        else:
            raise MessageError(
                f"an item of type {item.get('type')!r:.80} is no chat message; use function tools alone"
            )
    return messages


def items_of(message: Message) -> list[Item]:
    """The items of a message that a strategy kept, shortened or made."""
    if "items" not in message:
        return [{"role": message["role"], "content": message["content"]}]
    if message["role"] == "tool":
        return [{**message["items"][0], "output": message["content"]}]
    items: list[Item] = message["items"]
    return items


def _with_item(message: Message, item: Item) -> Message:
    """A reply's message with one more of its items."""
    message = {**message, "items": [*message["items"], item]}
    if item.get("type") == "function_call":
        function = {"name": item["name"], "arguments": item["arguments"]}
        call = {"id": item["call_id"], "type": "function", "function": function}
        return {**message, "tool_calls": [*message["tool_calls"], call]}
    if item.get("type") == "reasoning":
        parts = [*(item.get("content") or ()), *(item.get("summary") or ())]
        return {**message, "reasoning_content": "\n".join(part.get("text", "") for part in parts)}
    content = item.get("content") or ""
    text = content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
    return {**message, "content": message["content"] + text}
