"""`decode` and `ReplyParser`: round trips with `encode`, pieces cut anywhere, and replies gone wrong."""

import json
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fulmen.errors import MessageError
from fulmen.messages.encoding import ReplyParser, decode, encode, joined
from fulmen.messages.encoding.markup import (
    CALLS_CLOSE,
    CALLS_OPEN,
    DSML,
    EOS,
    INVOKE,
    INVOKE_CLOSE,
    PARAMETER,
    PARAMETER_CLOSE,
    THINK_CLOSE,
    THINK_OPEN,
)
from tests.messages.conversations import conversation, step, words

USER = {"role": "user", "content": "How warm is it?"}
X = f'{PARAMETER} name="x" string="true">one{PARAMETER_CLOSE}'
N = f'{PARAMETER} name="n" string="false">2{PARAMETER_CLOSE}'


def call(*parameters, name="f"):
    lines = "".join(f"\n{parameter}" for parameter in parameters)
    return f'{INVOKE} name="{name}">{lines}\n{INVOKE_CLOSE}'


def block(*calls):
    return "\n".join([f"\n\n{CALLS_OPEN}", *calls, CALLS_CLOSE])


def calls_in(message):
    """(name, arguments) of each call."""
    functions = [call["function"] for call in message["tool_calls"]]
    return [(function["name"], json.loads(function["arguments"])) for function in functions]


def fed(text, cuts, thinking):
    """The message that a text adds up to in pieces."""
    parser = ReplyParser(thinking)
    places = [0, *sorted(cuts), len(text)]
    deltas = [parser.feed(text[start:stop]) for start, stop in pairwise(places)]
    return joined([delta for found in [*deltas, parser.close()] for delta in found])


def reply(draw):
    """An assistant's message, with calls or without."""
    if draw.random() < 0.6:
        return step(draw, 0)[0]
    return {
        "role": "assistant",
        "content": words(draw),
        "reasoning_content": words(draw, 1),
        "tool_calls": [],
    }


def written(message, draw, thinking):
    """What a model would have to write to say a message."""
    asked = conversation(draw, turns=1, steps=1)
    before = encode(asked, thinking=thinking)
    text = encode([*asked, message], thinking=thinking)
    assert text.startswith(before)
    return text[len(before) :]


def check_round_trip(seed, thinking):
    draw = Random(seed)
    message = reply(draw)
    text = written(message, draw, thinking)
    read = decode(text, thinking)
    assert read["content"] == message["content"]
    assert read["reasoning_content"] == (message["reasoning_content"] if thinking else "")
    assert calls_in(read) == calls_in(message)
    cuts = [draw.randint(0, len(text)) for _ in range(draw.randint(0, 40))]
    assert fed(text, cuts, thinking) == read
    assert decode(text) == read
    assert written(read, Random(seed), thinking) == written(
        read | {"role": "assistant"}, Random(seed), thinking
    )


@pytest.mark.parametrize("thinking", [False, True], ids=["chat", "thinking"])
def test_replies_round_trip_in_any_pieces(thinking):
    for seed in range(500):
        check_round_trip(seed, thinking)


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20).filter(lambda text: "｜" not in text)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=5,
)
names = text.filter(lambda name: name and '"' not in name)


@settings(max_examples=100, deadline=None)
@given(text, st.lists(st.tuples(names, st.dictionaries(names, values, max_size=3)), max_size=3))
def test_any_text_and_any_arguments_round_trip(content, calls):
    message = {
        "role": "assistant",
        "content": content,
        "tool_calls": [{"function": {"name": name, "arguments": json.dumps(given)}} for name, given in calls],
    }
    said = encode([USER, message]).removeprefix(encode([USER]))
    read = decode(said, thinking=False)
    assert (read["content"], calls_in(read)) == (content, calls)
    assert fed(said, range(len(said)), thinking=False) == read


def test_a_reply_without_calls_is_its_text():
    for said in (
        "21 degrees.",
        "",
        "a < b\n\n",
        f"<{DSML}",
        "<function_results>",
        "call f(x)",
        '{"name": "f"}',
    ):
        expected = {"role": "assistant", "content": said, "reasoning_content": "", "tool_calls": []}
        assert decode(said) == expected
        assert decode(said + EOS + "more") == expected
        assert fed(said, range(len(said)), thinking=False) == expected


def test_reasoning_is_what_stands_before_its_end():
    assert decode(f"hm{THINK_CLOSE}21{EOS}")["reasoning_content"] == "hm"
    assert decode(f"{THINK_OPEN}hm{THINK_CLOSE}21")["reasoning_content"] == "hm"
    assert decode(f"{THINK_CLOSE}21")["content"] == "21"
    assert decode(f"{THINK_OPEN}cut o")["reasoning_content"] == "cut o"
    assert decode("cut o", thinking=True)["reasoning_content"] == "cut o"
    assert decode(f"a tag is {THINK_CLOSE}", thinking=False)["content"] == f"a tag is {THINK_CLOSE}"
    assert decode(f"Yes{block(call(X.replace('one', THINK_CLOSE)))}")["content"] == "Yes"


def test_ids_count_on():
    message = decode(block(call(X), call(N)), calls_before=3)
    assert [call["id"] for call in message["tool_calls"]] == ["call_3", "call_4"]
    assert {call["type"] for call in message["tool_calls"]} == {"function"}


def test_text_arguments_come_as_they_are_written():
    parser = ReplyParser(thinking=False)
    deltas = parser.feed(f'{CALLS_OPEN}\n{INVOKE} name="f">\n{PARAMETER} name="x" string="true">a "long"')
    begun, *arguments = [delta["tool_calls"][0] for delta in deltas]
    assert begun == {
        "index": 0,
        "id": "call_0",
        "type": "function",
        "function": {"name": "f", "arguments": ""},
    }
    assert "".join(call["function"]["arguments"] for call in arguments) == '{"x": "a \\"long\\"'
    assert parser.feed(" text")[0]["tool_calls"][0]["function"]["arguments"] == " text"


ONE_TWO = [("f", {"x": "one", "n": 2})]
RECOVERED = {
    "no block around it": (f"\n\n{call(X, N)}", ONE_TWO),
    "no end of the block": (f"\n\n{CALLS_OPEN}\n{call(X, N)}{EOS}", ONE_TWO),
    "half an end of the block": (f"\n\n{CALLS_OPEN}\n{call(X, N)}\n{CALLS_CLOSE[:9]}", ONE_TWO),
    "no end of the invocation": (block(call(X, N).removesuffix(INVOKE_CLOSE)), ONE_TWO),
    "no end of a parameter": (block(call(X.removesuffix(PARAMETER_CLOSE), N)), ONE_TWO),
    "no end of the last parameter": (block(call(X, N.removesuffix(PARAMETER_CLOSE))), ONE_TWO),
    "no attribute": (
        block(call(X.replace(' string="true"', ""), N.replace(' string="false"', ""))),
        ONE_TWO,
    ),
    "text that is called JSON": (block(call(X.replace("true", "false"))), [("f", {"x": "one"})]),
    "Python's NaN": (block(call(N.replace(">2<", ">NaN<"))), [("f", {"n": "NaN"})]),
    "a number that is too large": (block(call(N.replace(">2<", ">1e999<"))), [("f", {"n": "1e999"})]),
    "lists without end": (block(call(N.replace("2", "[" * 20_000))), [("f", {"n": "[" * 20_000})]),
    "one object": (block(call('{"x": "one", "n": 2}')), ONE_TWO),
    "blanks in tags": (block(call(X.replace('">', '"  >').replace(" string", "\n string"), N)), ONE_TWO),
    "no lines": (block(call(X, N)).replace("\n", ""), ONE_TWO),
    "made up results": (
        f"{block(call(X, N))}\n\n<function_results>\n<result>3{block(call(N))}",
        ONE_TWO,
    ),
    "no arguments": (block(call()), [("f", {})]),
    "names that look like a tag's end": (
        block(call(X.replace('"x"', '"> "'), name=">")),
        [(">", {"> ": "one"})],
    ),
    "two calls": (block(call(X), call(N, name="g")), [("f", {"x": "one"}), ("g", {"n": 2})]),
}


@pytest.mark.parametrize("every", [1, 7, 10**6], ids=["letters", "pieces", "whole"])
@pytest.mark.parametrize(("said", "calls"), RECOVERED.values(), ids=RECOVERED)
def test_what_has_one_reading_is_read(said, calls, every):
    said = f"Let me see.{said}"
    message = fed(said, range(every, len(said), every), thinking=False)
    assert calls_in(message) == calls
    assert message["content"] == "Let me see."


def test_a_call_ends_the_thinking():
    message = decode(f"Let me see.{block(call(X, N))}", thinking=True)
    assert (message["reasoning_content"], message["content"]) == ("Let me see.", "")
    assert calls_in(message) == ONE_TWO


REFUSED = {
    "half a block": (f"\n\n{CALLS_OPEN}\n", "no call"),
    "an empty block": (block(), "no call"),
    "half a tag": (f"\n\n{CALLS_OPEN}\n{INVOKE} name=", "within a call"),
    "half a parameter": (f'\n\n{CALLS_OPEN}\n{INVOKE} name="f">\n{X[:-20]}', "within a call"),
    "an end within text": (f'\n\n{CALLS_OPEN}\n{INVOKE} name="f">\n{X[:-20]}{EOS}', "within a call"),
    "half a call": (f'\n\n{CALLS_OPEN}\n{INVOKE} name="f">\n{X}', "within a call"),
    "an end within a call": (f'\n\n{CALLS_OPEN}\n{INVOKE} name="f">\n{X}{EOS}', "within a call"),
    "half a second call": (f"\n\n{CALLS_OPEN}\n{call(X)}\n{INVOKE[:9]}", "should be"),
    "a parameter twice": (block(call(X, X)), "given twice"),
    "a parameter without a call": (block(X), "should be"),
    "text between calls": (block(call(X), "and", call(N)), "stands where"),
    "text between parameters": (block(call(X, "and", N)), "'and' stands where"),
    "text for arguments": (block(call("x=1")), "'x=1' stands where"),
    "a list for arguments": (block(call("[1]")), "should be"),
    "a tag without a name": (block(f'{INVOKE} tool="f">\n{INVOKE_CLOSE}'), "a tag is"),
    "a name without end": (block(call(X.replace('"x"', '"x'))), "a tag is"),
    "a quotation mark in a name": (block(call(X.replace('"x"', '"x">y"'))), "a name goes on"),
    "one in the name of a number": (block(call(N.replace('"n"', '"n" string="false">m"'))), "a name goes on"),
    "a tag of more": (block(call(X.replace(" string", " kind=text string"))), "a tag is"),
    "a tag without end": (f"\n\n{CALLS_OPEN}\n{INVOKE} name={'f' * 2000}", "does not end"),
}


@pytest.mark.parametrize("every", [1, 10**6], ids=["letters", "whole"])
@pytest.mark.parametrize(("said", "why"), REFUSED.values(), ids=REFUSED)
def test_what_has_none_is_refused(said, why, every):
    with pytest.raises(MessageError, match=why) as refused:
        fed(said, range(every, len(said), every), thinking=False)
    assert "ask again" in str(refused.value)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            [
                *(
                    CALLS_OPEN,
                    CALLS_CLOSE,
                    INVOKE,
                    INVOKE_CLOSE,
                    PARAMETER,
                    PARAMETER_CLOSE,
                    THINK_CLOSE,
                    EOS,
                ),
                *(X, N, call(X), block(call(N)), ' name="f">', "\n", "\n\n", "text", '{"a": 1}', "<", '"'),
            ]
        ),
        max_size=12,
    ),
    st.booleans(),
)
def test_whatever_comes_is_read_or_refused_and_the_same_in_letters(parts, thinking):
    said = "".join(parts)
    outcomes = []
    for cuts in ((), range(len(said))):
        try:
            message = fed(said, cuts, thinking)
            assert all(isinstance(given, dict) for _, given in calls_in(message))
            outcomes.append(message)
        except MessageError:
            outcomes.append(None)
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("given", [None, 5, b"21", ["21"]], ids=repr)
def test_what_is_no_text_is_refused(given):
    with pytest.raises(MessageError, match="give decode text"):
        decode(given)


def test_nothing_is_held_back_but_the_start_of_a_mark():
    parser = ReplyParser(thinking=True)
    assert parser.feed("x" * 10**5) == [{"reasoning_content": "x" * 10**5}]
    assert parser.feed("\n\n<") == []
    assert parser.feed("｜DSML") == []
    assert joined(parser.feed("|"))["reasoning_content"] == "\n\n<｜DSML|"
