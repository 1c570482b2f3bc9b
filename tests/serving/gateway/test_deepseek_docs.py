"""The examples of DeepSeek's API documentation, page by page, by the clients that they use.

A tiny random model answers: it shows that each request is taken, reaches the engine as what it is, and comes
back in its form. Whether a model thinks, fills in well or calls the right tool is the model's business.
"""

import json
from decimal import Decimal
from importlib.util import find_spec

import pytest

if not find_spec("vllm"):
    pytest.skip("vLLM is not installed: pip install 'fulmen[serve-cpu]'", allow_module_level=True)

import anthropic
import httpx
import openai
from transformers import AutoTokenizer

from tests.serving.served import ALICE, BOB, DEPOSIT, EVE, QUESTION, ask, client, row, settled

LONG = "The lighthouse keeper counts forty-two ships. " * 40
WEATHER = {
    "type": "object",
    "properties": {"location": {"enum": ["Hangzhou"]}},
    "required": ["location"],
    "additionalProperties": False,
}
CALLED = '{"location":"Hangzhou"}'
WORD = {"type": "json_schema", "json_schema": {"name": "word", "schema": {"enum": ["ship"]}}}


@pytest.fixture(scope="module")
def towards(server):
    """A bias to the tokens of a text: the random model else puts blanks wherever JSON allows them."""
    tokenizer = AutoTokenizer.from_pretrained(server.model)
    return lambda text: dict.fromkeys(map(str, tokenizer.encode(text, add_special_tokens=False)), 100)


def weather(strict):
    function = {"name": "get_weather", "description": "Weather.", "parameters": WEATHER}
    return {"type": "function", "function": function | ({"strict": True} if strict else {})}


@pytest.mark.parametrize("model", ["deepseek-chat", "deepseek-reasoner", "tiny"])
def test_your_first_api_call(server, model):
    messages = [{"role": "system", "content": "You are a helpful assistant"}, *QUESTION]
    answer = ask(server, path="", model=model, messages=messages, stream=False)
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 4
    chunks = list(ask(server, path="", model=model, messages=messages, stream=True))
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage.completion_tokens == 4


@pytest.mark.parametrize("kind", ["enabled", "disabled"])
def test_thinking_mode(server, kind):
    """In form alone: this model's template knows no thoughts, so that it answers at once."""
    answer = ask(server, extra_body={"thinking": {"type": kind}})
    assert answer.choices[0].message.content
    assert not hasattr(answer.choices[0].message, "reasoning")
    assert answer.usage.completion_tokens_details.reasoning_tokens == 0


def test_multi_round_conversation(server):
    messages = list(QUESTION)
    first = ask(server, messages=messages)
    messages += [first.choices[0].message, {"role": "user", "content": "And who am I?"}]
    second = ask(server, messages=messages)
    assert second.usage.prompt_tokens > first.usage.prompt_tokens + 4


def test_chat_prefix_completion(server):
    begun = [*QUESTION, {"role": "assistant", "content": "I am", "prefix": True}]
    answer = ask(server, path="/beta", messages=begun, stop=["```"])
    plain = ask(server, path="/beta", messages=begun[:1])
    # "assistant\n" stands before both; the answer's own end is left open.
    assert answer.usage.prompt_tokens - plain.usage.prompt_tokens == 2


def test_fim_completion(server):
    completions = client(server, path="/beta").completions
    asked = {"model": "deepseek-chat", "max_tokens": 4, "prompt": "def fib(a):"}
    between = completions.create(**asked, suffix="    return fib(a-1) + fib(a-2)")
    plain = completions.create(**asked)
    suffix = completions.create(**asked | {"prompt": "    return fib(a-1) + fib(a-2)"})
    # Prompt and suffix, and the three tokens around them.
    lengths = [answer.usage.prompt_tokens for answer in (between, plain, suffix)]
    assert lengths[0] == lengths[1] + lengths[2] + 3
    assert between.choices[0].text
    assert "".join(chunk.choices[0].text for chunk in completions.create(**asked, suffix="}", stream=True))


def test_json_output(server, towards):
    asked = {"messages": [{"role": "user", "content": "Answer in JSON"}], "logit_bias": towards("{}")}
    answer = ask(server, **asked, response_format={"type": "json_object"}).choices[0]
    assert json.loads(answer.message.content) == {}
    assert answer.finish_reason == "stop"
    assert json.loads(ask(server, max_tokens=20, response_format=WORD).choices[0].message.content) == "ship"


def test_tool_calls(server, towards):
    """The strict call is asked for, as a random model makes none by itself; left to itself, it just talks."""
    messages = [{"role": "user", "content": "How is the weather in Hangzhou?"}]
    free = ask(server, model="deepseek-chat", tools=[weather(strict=False)], messages=messages)
    assert free.choices[0].message.content
    asked = {"path": "/beta", "model": "deepseek-chat", "tools": [weather(strict=True)], "max_tokens": 80}
    asked |= {"tool_choice": {"type": "function", "function": {"name": "get_weather"}}}
    asked |= {"temperature": 0, "logit_bias": towards(CALLED)}
    message = ask(server, **asked, messages=messages).choices[0].message
    (call,) = message.tool_calls
    assert (call.type, call.function.name) == ("function", "get_weather")
    assert json.loads(call.function.arguments) == {"location": "Hangzhou"}
    deltas = [chunk.choices[0].delta for chunk in ask(server, **asked, messages=messages, stream=True)]
    parts = [part.function.arguments or "" for delta in deltas for part in delta.tool_calls or []]
    assert json.loads("".join(parts)) == {"location": "Hangzhou"}
    messages += [message, {"role": "tool", "tool_call_id": call.id, "content": "24 degrees"}]
    assert (
        ask(server, tools=asked["tools"], model="deepseek-chat", messages=messages).choices[0].message.content
    )


def test_context_caching(server):
    messages = [{"role": "user", "content": LONG}]
    first, again = (ask(server, messages=messages).usage for _ in range(2))
    other = ask(server, key=BOB, messages=messages).usage
    assert first.prompt_cache_hit_tokens == other.prompt_cache_hit_tokens == 0
    assert again.prompt_cache_hit_tokens >= again.prompt_tokens - 128
    assert again.prompt_cache_hit_tokens + again.prompt_cache_miss_tokens == again.prompt_tokens
    assert Decimal(again.fulmen["cost"]) < Decimal(first.fulmen["cost"]) / 2


def test_lists_models(server):
    for path in ("", "/v1"):
        (model,) = client(server, path=path).models.list()
        assert (model.id, model.object, model.owned_by) == ("tiny", "model", "fulmen")


def test_get_user_balance(server):
    assert balance(server, EVE) == {"is_available": False, "balance_infos": [money("0.00")]}
    assert balance(server, BOB) == {"is_available": True, "balance_infos": []}
    spent = sum(entry.charge or 0 for entry in server.ledger.rows("alice"))
    assert balance(server, ALICE)["balance_infos"] == [money(f"{DEPOSIT - spent:.2f}")]


def balance(server, key):
    return httpx.get(f"{server.url}/user/balance", headers={"authorization": f"Bearer {key}"}).json()


def money(total):
    return {"currency": "CNY", "total_balance": total, "granted_balance": "0.00", "topped_up_balance": total}


@pytest.mark.parametrize(
    ("status", "kind", "fields"),
    [
        (400, openai.BadRequestError, {"model": "gpt"}),
        (401, openai.AuthenticationError, {"key": "sk-of-nobody-0123456789"}),
        (402, openai.APIStatusError, {"key": EVE}),
        (422, openai.UnprocessableEntityError, {"temperature": 3}),
    ],
)
def test_error_codes(server, status, kind, fields):
    """429 and 503 need a busy and a broken server; they stand in test_gateway_server.py."""
    with pytest.raises(kind) as caught:
        ask(server, **fields)
    assert caught.value.status_code == status
    assert caught.value.body["message"]
    assert status != 402 or caught.value.body["type"] == "insufficient_balance"


def test_anthropic_api(server):
    anthropics = anthropic.Anthropic(base_url=f"{server.url}/anthropic", api_key=ALICE, max_retries=0)
    asked = {"model": "tiny", "max_tokens": 4, "messages": QUESTION, "system": "You are helpful."}
    answer = anthropics.messages.create(**asked)
    entry, usage = row(server, answer.id.removeprefix("chatcmpl-")), answer.usage
    assert (entry.prompt_hit, entry.output) == (usage.cache_read_input_tokens, 4)
    assert entry.prompt_miss == usage.input_tokens + usage.cache_creation_input_tokens
    with anthropics.messages.stream(**asked) as stream:
        assert "".join(stream.text_stream)
        assert settled(server, stream.get_final_message().id.removeprefix("chatcmpl-")).output == 4
    with pytest.raises(anthropic.AuthenticationError):
        anthropic.Anthropic(base_url=f"{server.url}/anthropic", api_key="x").messages.create(**asked)
