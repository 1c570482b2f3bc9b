"""Answers whose tool calls vLLM could not read: no marks in the text, and no blame on the client."""

import json

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve: pip install 'fulmen[serve]'")

from fulmen.serving.gateway.dialects.assembled_message import AssembledMessage
from fulmen.serving.gateway.dialects.base import Event
from fulmen.serving.gateway.dialects.tool_call_text import CleanChat, CleanMessages, Unmarked

MARKS = ("<tool_call>", "<function=")
BILL = {"cost": "1"}


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("all of it", "all of it"),
        ("before<tool_call>{not json}</tool_call> after", "before"),
        ("<tool_call>", ""),
        ("a <tool_ca", "a <tool_ca"),
        ("a <tool_call", "a <tool_call"),
        ("1 < 2, <b>, <<tool_call>", "1 < 2, <b>, <"),
        ("x<function=f<tool_call>", "x"),
        ("", ""),
    ],
)
def test_a_text_is_shown_up_to_the_first_mark_however_it_is_cut(text, shown, size):
    unmarked = Unmarked(MARKS)
    pieces = [unmarked.feed(text[start : start + size]) for start in range(0, len(text), size)]
    assert "".join(pieces) + unmarked.end() == shown


def chunk(content=None, finish=None, calls=None, index=0, stop=None):
    delta = {key: value for key, value in (("content", content), ("tool_calls", calls)) if value is not None}
    choice = {"index": index, "delta": delta, "finish_reason": finish, "stop_reason": stop}
    return Event(None, json.dumps({"choices": [choice]}))


def test_a_chats_choices_are_cleaned_each_for_itself():
    clean, seen = CleanChat(MARKS), {0: "", 1: ""}
    for event in (chunk("a<tool"), chunk("b", index=1), chunk("_call>x"), chunk("<tool", "stop", index=1)):
        (cleaned,) = clean.event(event)
        choice = json.loads(cleaned.data)["choices"][0]
        seen[choice["index"]] += choice["delta"].get("content", "")
    assert seen == {0: "a", 1: "b<tool"}
    done = Event(None, "[DONE]")
    assert clean.event(done) == [done]


@pytest.mark.parametrize(
    ("finish", "stop", "shown"),
    [("stop", None, "tool_calls"), ("stop", "END", "stop"), ("length", None, "length")],
)
def test_a_call_that_ended_is_said_to_be_one(finish, stop, shown):
    clean = CleanChat(MARKS)
    clean.event(chunk(calls=[{"index": 0}]))
    (cleaned,) = clean.event(chunk(finish=finish, stop=stop))
    assert json.loads(cleaned.data)["choices"][0]["finish_reason"] == shown
    message = {"content": "a<tool_call>", "tool_calls": [{}]}
    answer = {"choices": [{"index": 0, "message": message, "finish_reason": finish, "stop_reason": stop}]}
    CleanChat(MARKS).answer(answer)
    assert answer["choices"][0]["finish_reason"] == shown
    assert message["content"] == "a"


def named(kind, **said):
    return Event(kind, json.dumps({"type": kind, **said}))


def text(piece, index=0):
    return named("content_block_delta", index=index, delta={"type": "text_delta", "text": piece})


def test_a_messages_text_is_cleaned_and_what_waited_comes_before_its_end():
    clean, end = CleanMessages(MARKS), named("content_block_stop", index=0)
    assert clean.event(text("1 <tool")) == [text("1 ")]
    assert clean.event(end) == [text("<tool"), end]
    assert CleanMessages(MARKS).event(text("<tool_call>x")) == []
    answer = {"content": [{"type": "text", "text": "a<tool_call>"}, {"type": "tool_use", "input": {}}]}
    CleanMessages(MARKS).answer(answer)
    assert answer["content"][0]["text"] == "a"


@pytest.mark.parametrize(
    ("arguments", "read"),
    [('{"a": 1}', {"a": 1}), ('"Paris"', {}), ("[1]", {}), ('{"a": ', {}), ("", {})],
)
def test_a_whole_message_is_put_together_whatever_its_calls_were_made_with(arguments, read):
    whole = AssembledMessage()
    call = {"type": "tool_use", "id": "1", "name": "f", "input": {}}
    usage = {"input_tokens": 4, "output_tokens": 7}
    events = [
        named("message_start", message={"id": "m", "content": [], "usage": {"input_tokens": 4}}),
        named("content_block_start", index=0, content_block={"type": "thinking", "thinking": ""}),
        named("content_block_delta", index=0, delta={"type": "thinking_delta", "thinking": "hm"}),
        named("content_block_delta", index=0, delta={"type": "signature_delta", "signature": "s"}),
        named("content_block_start", index=1, content_block={"type": "text", "text": ""}),
        text("Look", 1),
        named("content_block_start", index=2, content_block=call),
        *(
            named("content_block_delta", index=2, delta={"type": "input_json_delta", "partial_json": piece})
            for piece in arguments
        ),
        named("content_block_stop", index=2),
        named("message_delta", delta={"stop_reason": "tool_use", "stop_sequence": None}, usage=usage),
        named("message_stop"),
        Event(None, "[DONE]"),
    ]
    assert b"".join(map(whole.feed, events)) == b""
    message = json.loads(whole.tail(BILL))
    assert message["content"] == [
        {"type": "thinking", "thinking": "hm", "signature": "s"},
        {"type": "text", "text": "Look"},
        {**call, "input": read},
    ]
    assert (message["id"], message["stop_reason"], message["usage"]) == ("m", "tool_use", usage)
    assert whole.usage.tokens.output == 7


def test_a_message_without_a_word_has_an_empty_one():
    whole = AssembledMessage()
    whole.feed(named("message_start", message={"id": "m", "usage": {"input_tokens": 4}}))
    whole.feed(named("message_delta", delta={"stop_reason": "end_turn"}, usage={"output_tokens": 1}))
    assert json.loads(whole.tail(BILL))["content"] == [{"type": "text", "text": ""}]
