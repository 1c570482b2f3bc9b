"""`encode` against vLLM's copy of DeepSeek's own file, byte by byte, and what it refuses."""

from functools import cache
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from random import Random

import pytest

from fulmen.errors import MessageError
from fulmen.messages.encoding import encode
from tests.messages.conversations import conversation, step, tools

USER = {"role": "user", "content": "How warm is it?"}
CALL = {
    "id": "c",
    "type": "function",
    "function": {"name": "f", "arguments": '{"x": 1, "y": "z", "w": null}'},
}
CALLING = {"role": "assistant", "content": "", "reasoning": "hm", "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "c", "content": "21"}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
SCHEMA = {"type": "object", "properties": {"größe": {"type": "number"}}}


@cache
def oracle():
    """vLLM's module, without the rest of vLLM."""
    if (vllm := find_spec("vllm")) is None:
        pytest.skip("needs vLLM, whose copy of the encoding is the oracle")
    file = Path(vllm.origin).parent / "tokenizers" / "deepseek_v32_encoding.py"
    spec = spec_from_file_location("deepseek_v32_encoding", file)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def is_early_developer_in(messages):
    asking = [message["role"] for message in messages if message["role"] in ("user", "developer")]
    return "developer" in asking[:-1]


def expected(messages, tools=None, thinking=False):
    """By the oracle, which knows reasoning by one name only, and tools within messages.

    It means to drop a developer's message before the last turn of thinking, and fails then.
    """
    told = [dict(message) for message in messages]
    for message in told:
        if "reasoning_content" in message:
            message["reasoning"] = message.pop("reasoning_content")
    if tools and told[0]["role"] == "system":
        told[0]["tools"] = tools
    elif tools:
        told.insert(0, {"role": "system", "tools": tools})
    mode = "thinking" if thinking else "chat"
    if thinking and is_early_developer_in(told):
        with pytest.raises(ValueError, match="out of range"):
            oracle().encode_messages(told, mode)
        return oracle().encode_messages(told, mode, drop_thinking=False)
    return oracle().encode_messages(told, mode)


CASES = {
    "a question": [USER],
    "several turns": [USER, {"role": "assistant", "content": "21", "reasoning": "r"}, USER],
    "a system message": [{"role": "system", "content": "Be brief."}, USER],
    "a system message without text": [{"role": "system"}, USER],
    "system messages in the middle": [USER, {"role": "system", "content": "Now be long."}, USER],
    "nobody asks": [{"role": "system", "content": "Go on."}],
    "a developer": [{"role": "developer", "content": "Find it.", "tools": TOOLS, "response_format": SCHEMA}],
    "a developer after a user": [USER, {"role": "developer", "content": "Find it."}],
    "a developer before a user": [{"role": "developer", "content": "Find it."}, USER],
    "a developer before a user, and a step": [
        {"role": "developer", "content": "Find it."},
        {"role": "assistant", "content": "Yes."},
        USER,
        CALLING,
        RESULT,
    ],
    "a call": [USER, CALLING],
    "a step": [USER, CALLING, RESULT],
    "several steps": [USER, CALLING, RESULT, CALLING, RESULT],
    "steps of an earlier turn": [
        USER,
        CALLING,
        RESULT,
        {"role": "assistant", "content": "21", "reasoning": "so"},
        USER,
        CALLING,
        RESULT,
    ],
    "a turn that is over": [USER, CALLING, RESULT, {"role": "assistant", "content": "21", "reasoning": "so"}],
    "several calls": [
        USER,
        {"role": "assistant", "content": "I see.", "tool_calls": [CALL, {**CALL, "id": "d"}]},
        RESULT,
        {**RESULT, "tool_call_id": "d"},
    ],
    "a call without arguments": [
        USER,
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
        RESULT,
    ],
    "arguments as a dict": [
        USER,
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"a": [1, "ü"]}}}]},
        RESULT,
    ],
    "an answer's form": [{"role": "system", "content": "s", "tools": TOOLS, "response_format": SCHEMA}, USER],
    "an open answer": [USER, {"role": "assistant", "content": "It is", "prefix": True, "reasoning": "r"}],
    "vLLM's order of tools": [{"role": "system", "tools": TOOLS}, {"role": "system", "content": "s"}, USER],
}


@pytest.mark.parametrize("thinking", [False, True], ids=["chat", "thinking"])
@pytest.mark.parametrize("messages", CASES.values(), ids=CASES)
def test_cases_are_those_of_the_oracle(messages, thinking):
    assert encode(messages, thinking=thinking) == expected(messages, thinking=thinking)


def test_two_thousand_conversations_are_those_of_the_oracle():
    for seed in range(2000):
        draw = Random(seed)
        messages, offered = conversation(draw, steps=3), tools(draw) if draw.random() < 0.3 else None
        thinking = draw.random() < 0.6
        assert encode(messages, tools=offered, thinking=thinking) == expected(messages, offered, thinking)


def test_tools_stand_behind_the_first_system_message_or_in_front():
    system = {"role": "system", "content": "Be brief."}
    assert encode([system, USER], tools=TOOLS) == encode([{**system, "tools": TOOLS}, USER])
    assert encode([USER], tools=TOOLS) == encode([{"role": "system", "tools": TOOLS}, USER])
    form = encode([USER], response_format=SCHEMA)
    assert form == encode([{"role": "system", "response_format": SCHEMA}, USER])
    assert "größe" in form


def test_reasoning_has_two_names():
    named = [
        {**CALLING, "reasoning": None, "reasoning_content": "hm"},
        {**CALLING, "reasoning_content": "hm"},
    ]
    for calling in named:
        assert encode([USER, calling, RESULT], thinking=True) == encode(
            [USER, CALLING, RESULT], thinking=True
        )


def test_reasoning_is_dropped_at_a_new_user_message_and_nowhere_else():
    history = [USER, CALLING, RESULT, {**CALLING, "reasoning": "deeper"}, RESULT]
    assert all(text in encode(history, thinking=True) for text in ("hm</think>", "deeper</think>"))
    asked_again = encode([*history, USER], thinking=True)
    assert "hm" not in asked_again
    assert "deeper" not in asked_again


@pytest.mark.parametrize("seed", range(20))
def test_within_a_turn_each_text_goes_on_from_the_last_one(seed):
    """So a prefix cache holds all of it."""
    draw = Random(seed)
    messages = conversation(draw)
    before = encode(messages, thinking=True)
    for number in range(5):
        messages += step(draw, number)
        after = encode(messages, thinking=True)
        assert after.startswith(before)
        before = after


def test_results_are_written_in_the_order_of_their_calls():
    calling = {**CALLING, "tool_calls": [CALL, {**CALL, "id": "d"}]}
    results = [RESULT, {"role": "tool", "tool_call_id": "d", "content": "22"}]
    assert encode([USER, calling, *results[::-1]]) == encode([USER, calling, *results])


def test_text_parts_are_joined_and_nothing_is_empty():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert encode([{"role": "user", "content": parts}]) == encode([{"role": "user", "content": "a\nb"}])
    assert encode([USER, CALLING, {**RESULT, "content": None}]) == encode(
        [USER, CALLING, {**RESULT, "content": ""}]
    )
    no_arguments = {**CALLING, "tool_calls": [{**CALL, "function": {"name": "f", "arguments": ""}}]}
    empty = {**CALLING, "tool_calls": [{**CALL, "function": {"name": "f", "arguments": "{}"}}]}
    assert encode([USER, no_arguments, RESULT]) == encode([USER, empty, RESULT])


def test_nothing_is_changed():
    messages = conversation(Random(1))
    before = repr(messages)
    encode(messages, tools=TOOLS, thinking=True)
    assert repr(messages) == before


def with_arguments(arguments):
    return {**CALLING, "tool_calls": [{**CALL, "function": {"name": "f", "arguments": arguments}}]}


@pytest.mark.parametrize(
    ("messages", "named"),
    [
        (["hello"], "messages[0] is a str"),
        ([{"content": "x"}], "messages[0].role is None"),
        ([{"role": "function"}], "messages[0].role is 'function'"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content has more than text"),
        ([{"role": "user", "content": 3}], "messages[0].content has more than text"),
        ([{"role": "developer", "content": ""}], "messages[0] of the role developer is empty"),
        ([RESULT, USER], "messages[0] is a tool's result without a call"),
        ([USER, CALLING, RESULT, RESULT], "messages[1] has 1 tool calls, and 2 results"),
        ([USER, CALLING, USER], "messages[1] has 1 tool calls, and 0 results"),
        ([USER, {**CALLING, "tool_calls": [CALL, CALL]}, RESULT], "messages[1] has 2 tool calls, and 1"),
        ([USER, CALLING, {**RESULT, "tool_call_id": "other"}], "tool_call_id 'other' is none"),
        ([USER, {**CALLING, "tool_calls": ["f"]}, RESULT], "messages[1].tool_calls is ['f']"),
        (
            [USER, {**CALLING, "tool_calls": [{"id": "c"}]}, RESULT],
            "messages[1].tool_calls[0] has no function",
        ),
        ([USER, with_arguments("{"), RESULT], "messages[1].tool_calls[0]'s arguments are no JSON"),
        ([USER, with_arguments("[" * 100_000), RESULT], "messages[1].tool_calls[0]'s arguments are no JSON"),
        ([USER, with_arguments("[1]"), RESULT], "messages[1].tool_calls[0]'s arguments are [1]"),
        (
            [USER, with_arguments({"x": {1, 2}}), RESULT],
            "messages[1].tool_calls[0] cannot be written as JSON",
        ),
        ([USER, {"role": "assistant", "content": "21"}], "messages[1] has neither reasoning_content nor"),
        ([USER, {**CALLING, "reasoning_content": "no"}, RESULT], "messages[1] has a reasoning_content and"),
        ([USER, {**CALLING, "reasoning": ["hm"]}, RESULT], "messages[1]'s reasoning is [['hm']]"),
        ([USER, {"role": "assistant", "content": "a", "prefix": True, "reasoning": "b"}, USER], "has prefix"),
        ([{**USER, "tools": TOOLS}], "messages[0] has tools and is no system or developer message"),
        ([{"role": "system", "tools": ["f"]}, USER], "messages[0].tools has no function"),
    ],
)
def test_what_cannot_be_written_is_refused_by_name(messages, named):
    with pytest.raises(MessageError, match=r".+; .+") as refused:
        encode(messages, thinking=True)
    assert named in str(refused.value)
    assert "\n" not in str(refused.value)


def test_two_results_of_one_call_are_refused():
    calling = {**CALLING, "tool_calls": [CALL, {**CALL, "id": "d"}]}
    with pytest.raises(MessageError, match="same tool_call_id"):
        encode([USER, calling, RESULT, RESULT])


def test_messages_are_counted_as_they_were_sent():
    with pytest.raises(MessageError, match=r"^messages\[1\] has neither"):
        encode([USER, {"role": "assistant", "content": "21"}], tools=TOOLS, thinking=True)
    with pytest.raises(MessageError, match=r"^encode.tools has no function"):
        encode([USER], tools=["f"])
    with pytest.raises(MessageError, match=r"^encode.tools is 5"):
        encode([USER], tools=5)


@pytest.mark.parametrize("name", ['a"b', 'a">b', 'a" string="true">b', None, 5], ids=repr)
def test_names_that_the_format_cannot_write_are_refused(name):
    for function in ({"name": name}, {"name": "f", "arguments": {name: 1}}):
        calling = {**CALLING, "tool_calls": [{**CALL, "function": function}]}
        with pytest.raises(
            MessageError, match=r"^messages\[1\].tool_calls\[0\] has the name .+ without quotation"
        ):
            encode([USER, calling, RESULT])


def test_tools_in_two_places_are_refused():
    with pytest.raises(MessageError, match="tools stands in messages"):
        encode([{"role": "system", "tools": TOOLS}, USER], tools=TOOLS)
