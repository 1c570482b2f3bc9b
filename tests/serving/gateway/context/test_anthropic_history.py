"""Anthropic's messages through a strategy: as the same conversation in OpenAI's shape, and back."""

import asyncio
import json
from types import SimpleNamespace

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve: pip install 'fulmen[serve]'")

from fulmen.serving.billing.accounts import Account
from fulmen.serving.gateway.context.anthropic_history import chat_of_messages, messages_of_chat
from fulmen.serving.gateway.context.managed_context import ManagedContexts
from fulmen.serving.gateway.dialects.anthropic import AnthropicDialect, count_body, messages_body
from fulmen.serving.gateway.dialects.assembled_message import AssembledMessage
from fulmen.serving.gateway.dialects.base import Event
from fulmen.serving.gateway.dialects.requests import CountTokensRequest, MessagesRequest
from fulmen.serving.gateway.errors import ApiError
from tests.serving.gateway.context.test_managed_context import ALICE, CONTEXT, served

TOOLS = [{"name": "look", "description": "Looks.", "input_schema": {"type": "object", "properties": {}}}]
QUESTION = {"role": "user", "content": "Where is it?"}


def use(number):
    return {"type": "tool_use", "id": f"c{number}", "name": "look", "input": {"at": number}}


def result(number, content):
    return {"type": "tool_result", "tool_use_id": f"c{number}", "content": content}


def steps(count):
    """Each a thought with two calls, answered together; every third time the user says more."""
    said = [QUESTION]
    for number in range(count):
        thought = {"type": "thinking", "thinking": f"Step {number}.", "signature": "s"}
        words = {"type": "text", "text": "I look."}
        more = [{"type": "text", "text": f"Hurry, {number}."}] if number % 3 == 2 else []
        results = [
            result(f"{number}a", "north " * 40),
            result(f"{number}b", [{"type": "text", "text": "sail"}]),
        ]
        said.append({"role": "assistant", "content": [thought, words, use(f"{number}a"), use(f"{number}b")]})
        said.append({"role": "user", "content": [*results, *more]})
    return said


def request(messages, **fields):
    asked = {
        "model": "smol",
        "max_tokens": 100,
        "system": "Look it up.",
        "tools": TOOLS,
        "messages": messages,
    }
    return MessagesRequest.model_validate(asked | fields)


def managed(asked, account=ALICE):
    contexts = ManagedContexts(served(), SimpleNamespace(context=CONTEXT))
    try:
        return asyncio.run(contexts.managed_messages(asked, account))
    finally:
        contexts.close()


def test_a_conversation_is_the_same_in_openais_shape_and_back():
    asked = request(steps(3))
    chat = chat_of_messages(asked)
    said = [message.model_dump(exclude_none=True) for message in chat.messages]
    assert [message["role"] for message in said] == [
        *("system", "user", *["assistant", "tool", "tool"] * 2),
        *("assistant", "tool", "tool", "user"),
    ]
    assert said[2]["reasoning_content"] == "Step 0."
    assert [json.loads(call["function"]["arguments"]) for call in said[2]["tool_calls"]] == [
        {"at": "0a"},
        {"at": "0b"},
    ]
    assert (said[4]["tool_call_id"], said[4]["content"]) == ("c0b", "sail")
    again = messages_of_chat(asked, chat)
    assert chat_of_messages(again) == chat
    assert again.messages[1]["content"][2:] == asked.messages[1]["content"][2:]


def test_a_history_that_outgrows_its_budget_loses_steps_and_says_so():
    options = {"strategy": "discard_75", "budget": 1500}
    asked = request(steps(20), fulmen_context=options)
    kept, notes = managed(asked)
    assert notes["context"]["dropped"] > 0
    assert notes["context"]["prompt_tokens"] <= 1500
    assert kept.system == asked.system
    assert kept.messages[0] == QUESTION
    blocks = [block for message in kept.messages for block in message["content"] if isinstance(block, dict)]
    calls = [block["id"] for block in blocks if block["type"] == "tool_use"]
    assert calls == [block["tool_use_id"] for block in blocks if block["type"] == "tool_result"]
    assert {block["text"] for block in blocks if block["type"] == "text"} >= {
        f"Hurry, {number}." for number in range(2, 20, 3)
    }
    assert "fulmen_context" not in messages_body(kept, served(), "salt")
    assert managed(request(steps(20)), Account("bob", None, "s", strategy="discard_75"))[1]["context"]


def test_what_needs_no_strategy_stays_as_it_was_sent():
    picture = {"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "x"}}]}
    for asked in (request([picture]), request(steps(2), fulmen_context={"strategy": "discard_all"})):
        kept, _ = managed(asked)
        assert kept is asked
    with pytest.raises(ApiError, match=r"messages\[0\]\.content\[0\] is of type 'image'") as caught:
        managed(request([picture], fulmen_context={"strategy": "discard_all"}))
    assert (caught.value.status, caught.value.param) == (400, "messages[0].content[0]")


def test_a_count_takes_no_strategy():
    fields = {"model": "smol", "messages": [QUESTION], "fulmen_context": {"strategy": "none"}}
    with pytest.raises(ApiError, match="leave it out"):
        count_body(CountTokensRequest.model_validate(fields), served())


def test_clients_are_told_what_a_strategy_did():
    bill = {"cost": "1", "context": {"dropped": 4}}
    delta = {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 1}}
    start = {"type": "message_start", "message": {"usage": {"input_tokens": 9}}}
    for dialect in (AnthropicDialect(), AssembledMessage()):
        for said in (start, delta):
            dialect.feed(Event(said["type"], json.dumps(said)))
        data = dialect.tail(bill).decode()
        shown = json.loads(data.partition("data: ")[2] or data)
        assert shown["usage"] == {"output_tokens": 1, "fulmen": {"context": {"dropped": 4}}}
    assert AnthropicDialect().plain({"usage": {}}, bill)["usage"]["fulmen"]["context"] == {"dropped": 4}
