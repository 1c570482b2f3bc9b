"""Messages to the text that a model of DeepSeek-V3.2's chat format reads."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fulmen.errors import MessageError, one_line
from fulmen.messages.encoding.markup import (
    AFTER_TOOLS,
    ASSISTANT,
    BEFORE_SCHEMA,
    BEFORE_TOOLS,
    BEFORE_USERS_MESSAGE,
    BOS,
    CALLS_CLOSE,
    CALLS_OPEN,
    EOS,
    INVOKE,
    INVOKE_CLOSE,
    PARAMETER,
    PARAMETER_CLOSE,
    RESULT_CLOSE,
    RESULT_OPEN,
    RESULTS_CLOSE,
    RESULTS_OPEN,
    THINK_CLOSE,
    THINK_OPEN,
    USER,
)
from fulmen.messages.message import Message, calls_of, results_in_order, text_of, tool_steps

ASKING = ("user", "developer")


def encode(
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None = None,
    thinking: bool = False,
    response_format: Any = None,
) -> str:
    """The text of a conversation, with BOS, up to where the model goes on; tokenizers must add no BOS to it.

    It is DeepSeek-V3.2's own encoding to the byte. What is easily got wrong:

    - Reasoning is written from the last user (or developer) message on, through any number of tool calls, and
      left out before it. Results of tools sent as user messages would lose it: send them as `tool`.
    - It is read from `reasoning_content` or from `reasoning`, as clients differ.
    - A developer's message stays when a user's follows. V3.2's file drops it when thinking, and then fails on
      the messages that are left; this is its text with `drop_thinking=False`.
    - Tools stand behind the text of a first system message, as DeepSeek shows it, or in front of all.
      vLLM's server always puts them in front: begin with `{"role": "system", "tools": tools}` for that.
    - Results have neither ids nor names in this format: they are written in the order of their calls, and
      calls with too few results are refused, since their block would stay open.
    - An assistant's last message with `prefix` set stays open, without a thinking part.
    - Text that holds the format's own marks is written as it is. A name with a quotation mark, which the
      format cannot write, is refused.

    Args:
        messages: dicts in OpenAI's shape; arguments of calls are JSON texts or dicts. A system or developer
            message may have `tools` and `response_format` of its own.
        tools: in OpenAI's shape.
        thinking: whether the model thinks before it answers and after each result.
        response_format: what the answer's JSON is told to follow.

    Raises MessageError that names the message.
    """
    results = {step.start: results_in_order(messages, step) for step in tool_steps(messages)}
    last = max((index for index, message in enumerate(messages) if message["role"] in ASKING), default=-1)
    said, parts = list(messages), [BOS]
    offer = {key: value for key, value in (("tools", tools), ("response_format", response_format)) if value}
    if said and said[0]["role"] == "system":
        said[0] = _with_offer(said[0], offer)
    else:
        parts.append(_offer(offer, "encode"))
    for index, message in enumerate(said):
        name, thinks = f"messages[{index}]", thinking and index >= last
        if message["role"] not in ("system", "developer") and message.get("tools"):
            raise MessageError(f"{name} has tools and is no system or developer message; send them as tools")
        if message["role"] == "assistant":
            parts.append(_assistant(message, name, thinks, is_last=index == len(said) - 1))
            parts.append(_results(results.get(index, ()), thinks))
        elif message["role"] != "tool":
            parts.append(_WRITERS[message["role"]](message, name, thinks))
    return "".join(parts)


def _with_offer(message: Message, offer: Mapping[str, Any]) -> Message:
    """A first system message with what is offered to the model; MessageError if it offers the same itself."""
    if twice := [key for key in offer if message.get(key)]:
        raise MessageError(f"{twice[0]} stands in messages[0] and beside messages; send it once")
    return {**message, **offer}


def _system(message: Message, name: str, thinks: bool) -> str:
    return text_of(message, name) + _offer(message, name)


def _developer(message: Message, name: str, thinks: bool) -> str:
    if not (text := text_of(message, name)):
        raise MessageError(f"{name} of the role developer is empty; give it content")
    return _asked(_offer(message, name) + BEFORE_USERS_MESSAGE + text, thinks)


def _user(message: Message, name: str, thinks: bool) -> str:
    return _asked(text_of(message, name), thinks)


_WRITERS: dict[str, Callable[[Message, str, bool], str]] = {
    "system": _system,
    "developer": _developer,
    "user": _user,
}


def _asked(text: str, thinks: bool) -> str:
    return f"{USER}{text}{ASSISTANT}{_opening(thinks)}"


def _opening(thinks: bool) -> str:
    """What the model goes on from: a mode without thinking begins where thinking would end."""
    return THINK_OPEN if thinks else THINK_CLOSE


def _offer(message: Message, name: str) -> str:
    text = ""
    if tools := message.get("tools"):
        if not isinstance(tools, Sequence):
            raise MessageError(f"{name}.tools is {tools!r:.80}; use a list in OpenAI's shape")
        schemas = [_json(_function_of(tool, f"{name}.tools"), f"{name}.tools") for tool in tools]
        text += "\n\n" + BEFORE_TOOLS + "\n".join(schemas) + AFTER_TOOLS
    if schema := message.get("response_format"):
        text += "\n\n" + BEFORE_SCHEMA + _json(schema, f"{name}.response_format")
    return text


def _assistant(message: Message, name: str, thinks: bool, is_last: bool) -> str:
    calls, text = calls_of(message), text_of(message, name)
    reasoning = reasoning_of(message, name)
    if thinks and not (reasoning or calls):
        raise MessageError(
            f"{name} has neither reasoning_content nor tool_calls; give it its reasoning, or encode "
            "with thinking=False"
        )
    if message.get("prefix") and not calls:
        if not is_last:
            raise MessageError(f"{name} has prefix, and others follow it; only the last one may stay open")
        return text
    thought = reasoning + THINK_CLOSE if thinks else ""
    return thought + text + (_calls(calls, name) if calls else "") + EOS


def reasoning_of(message: Message, name: str) -> str:
    """A message's reasoning, called `reasoning_content` or `reasoning`; empty without.

    Args:
        name: of the message in the MessageError for one that has both, and not the same.
    """
    given = [message[key] for key in ("reasoning_content", "reasoning") if message.get(key)]
    if not all(isinstance(text, str) for text in given):
        raise MessageError(f"{name}'s reasoning is {given!r:.80}; send text")
    if len(set(given)) > 1:
        raise MessageError(f"{name} has a reasoning_content and another reasoning; send one of them")
    return given[0] if given else ""


def _calls(calls: Sequence[Mapping[str, Any]], name: str) -> str:
    written = [_call(call, f"{name}.tool_calls[{place}]") for place, call in enumerate(calls)]
    return "\n".join(["\n\n" + CALLS_OPEN, *written, CALLS_CLOSE])


def _call(call: Mapping[str, Any], name: str) -> str:
    function = _function_of(call, name)
    lines = [
        f'{PARAMETER} name="{_name(key, name)}" string="{str(isinstance(value, str)).lower()}">'
        f"{value if isinstance(value, str) else _json(value, name)}{PARAMETER_CLOSE}"
        for key, value in _arguments(function, name).items()
    ]
    called = _name(function.get("name"), name)
    return f'{INVOKE} name="{called}">\n' + "\n".join(lines) + f"\n{INVOKE_CLOSE}"


def _name(given: Any, place: str) -> str:
    """A function's or argument's name, as it stands between quotation marks."""
    if not isinstance(given, str) or '"' in given:
        raise MessageError(f"{place} has the name {given!r:.80}; use text without quotation marks")
    return given


def _function_of(holder: Any, name: str) -> Mapping[str, Any]:
    function = holder.get("function") if isinstance(holder, Mapping) else None
    if not isinstance(function, Mapping):
        raise MessageError(f"{name} has no function: {holder!r:.80}; use OpenAI's shape")
    return function


def _arguments(function: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    given = function.get("arguments")
    try:
        arguments = json.loads(given or "{}") if given is None or isinstance(given, str) else given
    except (ValueError, RecursionError) as error:
        raise MessageError(f"{name}'s arguments are no JSON: {one_line(error)}; fix them") from error
    if not isinstance(arguments, Mapping):
        raise MessageError(f"{name}'s arguments are {arguments!r:.80}; use a JSON object")
    return arguments


def _results(results: Sequence[Message], thinks: bool) -> str:
    if not results:
        return ""
    texts = [text_of(result, "a message of the role tool") for result in results]
    written = [f"{RESULT_OPEN}{text}{RESULT_CLOSE}" for text in texts]
    return "\n".join(["\n\n" + RESULTS_OPEN, *written, RESULTS_CLOSE]) + "\n\n" + _opening(thinks)


def _json(value: Any, name: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise MessageError(f"{name} cannot be written as JSON: {one_line(error)}; fix it") from error
