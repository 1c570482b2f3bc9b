"""What the official clients of OpenAI's and Anthropic's newer calls get from the whole server."""

import json
from importlib.util import find_spec

import pytest

if not find_spec("vllm"):
    pytest.skip("vLLM is not installed: pip install 'fulmen[serve-cpu]'", allow_module_level=True)

import anthropic
import httpx
import openai

from fulmen.serving.billing.prices import DEFAULT_PRICES, Tokens
from tests.processes import WAIT_S
from tests.serving.served import ALICE, EVE, QUESTION, ask, client, row, settled

LONG = "The harbour master writes down nineteen sails. " * 40
YES = {"type": "json_schema", "name": "word", "schema": {"enum": ["yes"]}}
TOOL = {"name": "get_weather", "description": "Weather of a city", "input_schema": {
    "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}  # fmt: skip


def claude(server, key=ALICE):
    return anthropic.Anthropic(base_url=f"{server.url}/anthropic", api_key=key, max_retries=0, timeout=WAIT_S)


@pytest.mark.parametrize(
    "more",
    [{}, {"system": "Be brief", "tools": [TOOL]}, {"thinking": {"type": "enabled", "budget_tokens": 1024}}],
    ids=["text", "system and tools", "thinking"],
)
def test_counted_tokens_are_those_that_a_message_is_charged_for(server, more):
    messages, spent = claude(server).messages, server.ledger.balance("alice")
    counted = messages.count_tokens(model="tiny", messages=QUESTION, **more).input_tokens
    assert server.ledger.balance("alice") == spent, "counting is free"
    limits = (
        {"max_tokens": 2000, "stop_sequences": list("aeiou ")} if "thinking" in more else {"max_tokens": 1}
    )
    used = messages.create(model="tiny", messages=QUESTION, **limits, **more).usage
    assert counted == used.input_tokens + used.cache_read_input_tokens + used.cache_creation_input_tokens > 0


def test_counting_refuses_what_messages_refuse(server):
    with pytest.raises(anthropic.AuthenticationError):
        claude(server, "sk-of-nobody-0123456789").messages.count_tokens(model="tiny", messages=QUESTION)
    with pytest.raises(anthropic.NotFoundError):
        claude(server).messages.count_tokens(model="gpt", messages=QUESTION)
    with pytest.raises(anthropic.BadRequestError, match=r"messages\[0\].role: Input should be"):
        claude(server).messages.count_tokens(model="tiny", messages=[{"role": "nobody", "content": "x"}])


def test_models_in_anthropics_shape_where_its_clients_ask(server):
    (model,) = claude(server).models.list().data
    assert (model.id, model.type, model.display_name, model.max_input_tokens) == (
        "tiny",
        "model",
        "tiny",
        16384,
    )
    assert claude(server).models.retrieve("claude-sonnet-4-5").id == "tiny"
    with pytest.raises(anthropic.NotFoundError):
        claude(server).models.retrieve("gpt")
    headers = {"x-api-key": ALICE, "anthropic-version": "2023-06-01"}
    assert httpx.get(f"{server.url}/v1/models", headers=headers).json()["data"][0]["type"] == "model"
    assert httpx.get(f"{server.url}/anthropic/v1/models").status_code == 401


def test_names_of_anthropics_models_mean_this_one_and_others_are_404(server):
    answer = claude(server).messages.create(model="claude-of-tomorrow", max_tokens=1, messages=QUESTION)
    assert answer.model == "tiny"
    with pytest.raises(anthropic.NotFoundError) as caught:
        claude(server).messages.create(model="gpt", max_tokens=1, messages=QUESTION)
    assert "'gpt'" in caught.value.message


@pytest.mark.parametrize(
    ("thinking", "max_tokens", "named"),
    [
        ({"type": "enabled", "budget_tokens": 1024}, 1024, "thinking.budget_tokens=1024"),
        ({"type": "enabled", "budget_tokens": 10}, 2000, "thinking.budget_tokens"),
        ({"type": "enabled", "budget_tokens": "many"}, 2000, "thinking.budget_tokens"),
        ({"type": "sometimes"}, 2000, "thinking.type"),
    ],
)
def test_a_budget_for_thoughts_that_cannot_be_is_named(server, thinking, max_tokens, named):
    with pytest.raises(anthropic.UnprocessableEntityError) as caught:
        claude(server).messages.create(
            model="tiny", max_tokens=max_tokens, messages=QUESTION, thinking=thinking
        )
    assert caught.value.body["error"]["message"].startswith(named)


@pytest.mark.parametrize("kind", ["adaptive", "disabled"])
def test_thinking_without_a_budget_is_taken(server, kind):
    answer = claude(server).messages.create(
        model="tiny", max_tokens=1, messages=QUESTION, thinking={"type": kind}
    )
    assert answer.usage.output_tokens == 1


def test_a_response_is_an_answer_with_its_cost_in_the_ledger(server):
    responses = client(server).responses
    first, again = (responses.create(model="tiny", input=LONG, max_output_tokens=4) for _ in range(2))
    assert (first.status, first.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert first.output_text
    assert again.usage.input_tokens_details.cached_tokens >= again.usage.input_tokens - 128 > 0
    for answer in (first, again):
        hit = answer.usage.input_tokens_details.cached_tokens
        entry = row(server, answer.id.removeprefix("resp_"))
        assert (entry.outcome, entry.prompt_hit, entry.output) == ("done", hit, 4)
        cost = DEFAULT_PRICES.cost(Tokens(hit, answer.usage.input_tokens - hit, 4))
        assert f"{entry.charge:f}".rstrip("0") == f"{cost:f}".rstrip("0") == answer.usage.fulmen["cost"]


def test_a_response_streams_to_its_end_and_keeps_its_form(server):
    asked = {"model": "tiny", "input": [{"role": "user", "content": "Yes?"}], "text": {"format": YES}}
    with client(server).responses.stream(**asked, max_output_tokens=60) as stream:
        kinds = [event.type for event in stream]
        answer = stream.get_final_response()
    assert json.loads(answer.output_text) == "yes"
    assert (kinds[0], kinds[-1], answer.status) == ("response.created", "response.completed", "completed")
    assert settled(server, answer.id.removeprefix("resp_")).output == answer.usage.output_tokens


@pytest.mark.parametrize(
    ("status", "field", "fields"),
    [
        (400, "previous_response_id", {"previous_response_id": "resp_1"}),
        (400, "input", {"input": "ship " * 8 * 5000}),
        (400, "max_output_tokens", {"max_output_tokens": 10**6}),
        (400, "model", {"model": "gpt"}),
        (
            422,
            "tools[0].parameters",
            {"tools": [{"type": "function", "name": "f", "parameters": {"type": "x"}}]},
        ),
        (422, "input[0]", {"input": [{"type": "computer_call"}]}),
    ],
)
def test_a_response_is_refused_by_the_field_that_was_sent(server, status, field, fields):
    with pytest.raises(openai.APIStatusError) as caught:
        client(server).responses.create(**{"model": "tiny", "input": "Hi", **fields})
    assert (caught.value.status_code, caught.value.body["param"]) == (status, field)


def test_a_response_needs_money_as_a_chat_does(server):
    with pytest.raises(openai.APIStatusError) as caught:
        client(server, EVE).responses.create(model="tiny", input="Hi")
    assert caught.value.status_code == 402


def test_as_many_stops_as_deepseek_takes(server):
    stops = [f"stop{i}" for i in range(16)]
    assert ask(server, stop=stops).usage.completion_tokens == 4
    asked = {"model": "tiny", "max_tokens": 4, "messages": QUESTION}
    assert claude(server).messages.create(**asked, stop_sequences=stops).usage.output_tokens == 4
