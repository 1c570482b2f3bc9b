"""Chat messages in OpenAI's shape: their text, and which results answer which calls."""

from collections.abc import Mapping, Sequence
from typing import Any

from fulmen.errors import MessageError

Message = Mapping[str, Any]
ROLES = ("system", "developer", "user", "assistant", "tool")


def check_messages(messages: Sequence[Message], start: int = 0) -> None:
    """Raises MessageError for what are no messages, a role that is none of ROLES, and calls that are none.

    Args:
        start: the first that is looked at.
    """
    if not isinstance(messages, Sequence):
        raise MessageError(
            f"messages is a {type(messages).__name__}; use a list of dicts with role and content"
        )
    for index, message in enumerate(messages[start:], start):
        # dict by itself is asked in a tenth of the time that Mapping takes.
        if not isinstance(message, (dict, Mapping)):
            raise MessageError(
                f"messages[{index}] is a {type(message).__name__}; use dicts with role and content"
            )
        if message.get("role") not in ROLES:
            raise MessageError(
                f"messages[{index}].role is {message.get('role')!r:.80}; use {', '.join(ROLES)}"
            )
        if not (calls := message.get("tool_calls")):
            continue
        if not isinstance(calls, Sequence) or not all(isinstance(call, (dict, Mapping)) for call in calls):
            raise MessageError(
                f"messages[{index}].tool_calls is {calls!r:.80}; use a list of dicts in OpenAI's shape"
            )


def text_of(message: Message, name: str) -> str:
    """A message's content: a text, nothing, or text parts, which are joined by line ends.

    Args:
        name: of the message in the MessageError for a content of another kind.
    """
    content = message.get("content")
    if content is None or isinstance(content, str):
        return content or ""
    parts = content if isinstance(content, list) else [content]
    texts: list[Any] = [part.get("text") if isinstance(part, Mapping) else part for part in parts]
    for text in texts:
        if not isinstance(text, str):
            raise MessageError(f"{name}.content has more than text: {str(parts)[:80]}; send text alone")
    return "\n".join(texts)


def calls_of(message: Message) -> list[Mapping[str, Any]]:
    """The calls of an assistant's message; none of any other."""
    return list(message.get("tool_calls") or ()) if message["role"] == "assistant" else []


def tool_steps(messages: Sequence[Message]) -> list[range]:
    """The places of each assistant message with calls and of the results that follow it, in order.

    Raises MessageError for a result without a call before it, and for calls that have not as many results,
    unless the messages end with the calls.
    """
    check_messages(messages)
    steps, index = [], 0
    while index < len(messages):
        stop = index + 1
        if calls := calls_of(messages[index]):
            while stop < len(messages) and messages[stop]["role"] == "tool":
                stop += 1
            _check_count(len(calls), stop - index - 1, index, is_open=stop == index + 1 == len(messages))
            steps.append(range(index, stop))
        elif messages[index]["role"] == "tool":
            raise MessageError(
                f"messages[{index}] is a tool's result without a call before it; "
                "keep the assistant's message with its tool_calls"
            )
        index = stop
    return steps


def results_in_order(messages: Sequence[Message], step: range) -> list[Message]:
    """A step's results in the order of its calls: by their ids if all have them, else as they come.

    Raises MessageError for a result whose id is none of the calls'.
    """
    calls = calls_of(messages[step.start])
    results = [messages[index] for index in step[1:]]
    if [call.get("id") for call in calls] == [result.get("tool_call_id") for result in results]:
        return results
    call_ids = [_id(call.get("id")) for call in calls]
    given = {_id(result.get("tool_call_id")): result for result in results}
    if not (all(call_ids) and all(given)) or len(set(call_ids)) < len(call_ids):
        return results
    if results and (strangers := given.keys() - set(call_ids)):
        raise MessageError(
            f"tool_call_id {min(strangers)!r:.80} is none of the calls of messages[{step.start}]; "
            "send each result with the id of its call"
        )
    if len(given) < len(results):
        raise MessageError(
            f"two results of messages[{step.start}] have the same tool_call_id; send one for each call"
        )
    return [given[call_id] for call_id in call_ids if call_id in given]


def _id(given: Any) -> str:
    """An id as text; empty for none."""
    return "" if given is None else str(given)


def _check_count(calls: int, results: int, index: int, is_open: bool) -> None:
    if calls != results and not is_open:
        raise MessageError(
            f"messages[{index}] has {calls} tool calls, and {results} results follow it; "
            "send one result for each call"
        )
