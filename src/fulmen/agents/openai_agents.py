"""Strategies for the package openai-agents: a `call_model_input_filter`, on its plain data alone.

RunConfig(call_model_input_filter=input_filter(discard_all, budget=100_000, count=count))
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fulmen.agents.messages import Message
from fulmen.agents.strategies import Counter, Strategy, at_every_call
from fulmen.errors import MessageError

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
            stand in the prompt are for it to count.

    The filter raises what the strategy does, and MessageError for an item of a hosted tool.
    """
    managed = at_every_call(strategy)

    def filtered(data: Any) -> Any:
        given = data.model_data
        instructions = [{"role": "system", "content": given.instructions}] if given.instructions else []
        replies = messages_of(given.input)
        kept = managed([*instructions, *(message for message, _ in replies)], budget, count)
        return dataclasses.replace(given, input=_items_of(kept[len(instructions) :], replies))

    return filtered


def messages_of(items: Sequence[Item]) -> list[tuple[Message, list[Item]]]:
    """Items as chat messages, each with the items that it stands for.

    Raises MessageError for an item that is neither said, nor reasoning, nor a function's call or output.
    """
    found: list[tuple[Message, list[Item]]] = []
    is_reply = False
    for item in items:
        was_reply, is_reply = is_reply, item.get("role") == "assistant" or item.get("type") in _OF_A_REPLY
        if is_reply:
            if not was_reply:
                found.append(({"role": "assistant", "content": "", "tool_calls": []}, []))
            message, own = found[-1]
            own.append(item)
            found[-1] = (_with_item(message, item), own)
        elif item.get("type") == "function_call_output":
            result = {"role": "tool", "tool_call_id": item["call_id"], "content": item["output"]}
            found.append((result, [item]))
        elif item.get("type", "message") == "message":
            found.append(({"role": item.get("role"), "content": item.get("content")}, [item]))
        else:
            raise MessageError(
                f"an item of type {item.get('type')!r:.80} is no chat message; use function tools alone"
            )
    return found


def _with_item(message: Message, item: Item) -> Message:
    """A reply's message with one more of its items."""
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


def _items_of(kept: Sequence[Message], replies: Sequence[tuple[Message, list[Item]]]) -> list[Item]:
    """The items of messages that a strategy kept, shortened or made."""
    own = {id(message): items for message, items in replies}
    outputs = {
        message.get("tool_call_id"): items[0] for message, items in replies if message["role"] == "tool"
    }
    items: list[Item] = []
    for message in kept:
        if id(message) in own:
            items += own[id(message)]
        elif message["role"] == "tool":
            items.append({**outputs[message["tool_call_id"]], "output": message["content"]})
        else:
            items.append({"role": message["role"], "content": message["content"]})
    return items
