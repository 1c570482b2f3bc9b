"""Histories that outgrow the context, at the whole server: what is sent, hit again, charged and said."""

from importlib.util import find_spec

import pytest

if not find_spec("vllm"):
    pytest.skip("vLLM is not installed: pip install 'fulmen[serve-cpu]'", allow_module_level=True)

import openai

from fulmen.serving.billing.accounts import Accounts
from tests.serving.gateway.context.test_managed_context import history
from tests.serving.served import ask, client

# Tokens of a prompt; tokens of a block of the engine's cache at most.
BUDGET, BLOCK = 1000, 128
OPTIONS = {"fulmen_context": {"strategy": "discard_all", "budget": BUDGET}}


def test_a_history_stays_within_its_budget_and_goes_on_in_the_cache(server):
    long = history(40, seed=11)
    whole = ask(server, messages=long)
    assert "context" not in whole.usage.fulmen
    first = ask(server, messages=long[:62], extra_body=OPTIONS)
    said = first.usage.fulmen["context"]
    assert (said["strategy"], said["messages"], said["budget"]) == ("discard_all", 62, BUDGET)
    assert said["dropped"] > 0
    assert first.usage.prompt_tokens <= said["prompt_tokens"] <= BUDGET
    assert said["prompt_tokens"] - first.usage.prompt_tokens < 40
    second = ask(server, messages=long[:64], extra_body=OPTIONS)
    assert second.usage.fulmen["context"]["dropped"] == said["dropped"]
    # Whole blocks of the cache are hit.
    assert second.usage.prompt_cache_hit_tokens > first.usage.prompt_tokens - BLOCK


def test_streams_and_responses_say_it_too(server):
    *_, last = ask(server, messages=history(30, seed=12), stream=True, extra_body=OPTIONS)
    assert last.usage.fulmen["context"]["dropped"] > 0
    items = [{"role": message["role"], "content": message["content"]} for message in history(0)]
    for number in range(30):
        call = {"type": "function_call", "call_id": f"c{number}", "name": "look", "arguments": "{}"}
        output = {"type": "function_call_output", "call_id": f"c{number}", "output": "a red sail " * 20}
        items += [call, output]
    answer = client(server).responses.create(
        model="tiny", input=items, max_output_tokens=4, extra_body=OPTIONS
    )
    assert answer.usage.fulmen["context"]["dropped"] > 0


def test_a_keys_strategy_is_every_requests(server):
    key = Accounts(server.state).issue("careful", strategy="discard_all")
    long = history(300, seed=13)
    with pytest.raises(openai.BadRequestError, match="context"):
        ask(server, messages=long)
    answer = ask(server, key, messages=long)
    assert answer.usage.fulmen["context"]["dropped"] > 0
    Accounts(server.state).revoke("careful")


@pytest.mark.parametrize(
    ("path", "options", "param"),
    [
        ("/v1", {"strategy": "best"}, "fulmen_context.strategy"),
        ("/v1", {"strategy": "none", "trigger": 3}, "fulmen_context.trigger"),
        ("/v1", {"strategy": "discard_all", "newest": 3}, "fulmen_context.newest"),
    ],
)
def test_bad_options_are_named(server, path, options, param):
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        ask(server, path=path, extra_body={"fulmen_context": options})
    assert caught.value.param == param
