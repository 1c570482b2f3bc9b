"""Forced calls, and schemas that take too long, as clients see them: a random model keeps to nothing."""

import asyncio
import json
import threading
from importlib.util import find_spec
from typing import Literal

import pytest

if not find_spec("vllm"):
    pytest.skip("vLLM is not installed: pip install 'fulmen[serve-cpu]'", allow_module_level=True)

import agents
import anthropic
import openai
from jsonschema_rs import Draft202012Validator
from tokenizers import Tokenizer

from tests.processes import WAIT_S
from tests.serving.served import ALICE, BOB, QUESTION, ask

UNIT = {"enum": ["celsius", "kelvin"]}
WEATHER = {
    "type": "object",
    "properties": {
        "unit": {"$ref": "#/$defs/unit"},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "wind": {"anyOf": [{"type": "boolean"}, {"type": "null"}]},
    },
    "required": ["unit", "days"],
    "additionalProperties": False,
    "$defs": {"unit": UNIT},
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "clock"}},
]
JUDGES = {"weather": Draft202012Validator(WEATHER), "clock": Draft202012Validator({"const": {}})}
NAMED = {"type": "function", "function": {"name": "weather"}}
UNKNOWN = {"type": "string", "pattern": "(a)\\1"}
SLOW = {"type": "string", "pattern": "^(.{0,6000})(.{0,6001})$"}


@pytest.fixture(scope="module")
def unspaced(server):
    """Keeps a random model from filling its answer with what may stand anywhere in JSON."""
    tokenizer = Tokenizer.from_file(str(server.model / "tokenizer.json"))
    places = range(tokenizer.get_vocab_size())
    return {str(place): -100 for place in places if tokenizer.decode([place]).isspace()}


def whole(stream):
    """The calls of a stream, put together from its pieces, its content and how it ended."""
    calls, content, finish = {}, "", None
    for chunk in stream:
        for choice in chunk.choices:
            content, finish = content + (choice.delta.content or ""), choice.finish_reason or finish
            for piece in choice.delta.tool_calls or []:
                name, said = calls.setdefault(piece.index, ["", ""])
                calls[piece.index] = [
                    name + (piece.function.name or ""),
                    said + (piece.function.arguments or ""),
                ]
    return [tuple(call) for call in calls.values()], content, finish


@pytest.mark.parametrize("streams", [True, False], ids=["stream", "plain"])
@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_a_forced_call_meets_its_schema(server, unspaced, choice, streams):
    ended = 0
    for seed in range(2):
        said = {"tools": TOOLS, "tool_choice": choice, "seed": seed, "max_tokens": 160, "stream": streams}
        answer = ask(server, parallel_tool_calls=False, logit_bias=unspaced, **said)
        if streams:
            calls, content, finish = whole(answer)
        else:
            message, finish = answer.choices[0].message, answer.choices[0].finish_reason
            calls = [(call.function.name, call.function.arguments) for call in message.tool_calls or []]
            content = message.content or ""
        assert content == ""
        assert finish in ("tool_calls", "length")
        if finish == "tool_calls":
            ((name, arguments),) = calls
            assert name == "weather" or choice == "required"
            JUDGES[name].validate(json.loads(arguments))
            ended += 1
    assert ended


@pytest.mark.parametrize("streams", [True, False], ids=["stream", "plain"])
@pytest.mark.parametrize(
    "choice", [{"type": "any"}, {"type": "tool", "name": "weather"}], ids=["any", "tool"]
)
def test_anthropics_client_gets_what_it_forces(server, choice, streams):
    asked = anthropic.Anthropic(
        base_url=f"{server.url}/anthropic", api_key=ALICE, max_retries=0, timeout=WAIT_S
    )
    tools = [{"name": "weather", "input_schema": WEATHER}]
    said = {"model": "tiny", "max_tokens": 160, "messages": QUESTION, "tools": tools}
    said["tool_choice"] = choice | {"disable_parallel_tool_use": True}
    if streams:
        with asked.messages.stream(**said) as stream:
            message = stream.get_final_message()
    else:
        message = asked.messages.create(**said)
    assert message.stop_reason in ("tool_use", "max_tokens")
    if message.stop_reason == "tool_use":
        (block,) = message.content
        assert (block.type, block.name) == ("tool_use", "weather")
        JUDGES["weather"].validate(block.input)


def test_what_is_cut_short_says_so_and_shows_no_marks(server):
    for choice in ("required", NAMED):
        answer = ask(server, tools=TOOLS, tool_choice=choice, max_tokens=12).choices[0]
        assert answer.finish_reason == "length"
        assert "<tool_call>" not in (answer.message.content or "")


def formatted(schema):
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}}


def forced(schema):
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    return {"tools": [tool], "tool_choice": "required"}


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        (formatted(SLOW), "response_format.json_schema.schema"),
        (forced({"type": "object", "properties": {"a": UNKNOWN}}), "tools[0].function.parameters"),
        (formatted(UNKNOWN), "response_format.json_schema.schema"),
    ],
    ids=["slow", "unknown in a tool", "unknown"],
)
def test_a_schema_is_refused_while_another_stream_goes_on(server, fields, field):
    spent, came, refused = server.ledger.balance("alice"), [], []

    def refuse():
        with pytest.raises(openai.UnprocessableEntityError) as caught:
            ask(server, **fields)
        refused.append(caught.value)

    with ask(server, key=BOB, stream=True, max_tokens=15000, extra_body={"ignore_eos": True}) as stream:
        pieces = iter(stream)
        next(pieces)
        asking = threading.Thread(target=refuse)
        asking.start()
        while asking.is_alive():
            came.append(next(pieces))
    assert refused[0].body["param"] == field
    assert "HTTP" not in refused[0].body["message"]
    assert server.ledger.balance("alice") == spent
    assert len(came) > 1


def test_an_agent_of_openai_agents_calls_its_tool(server, unspaced):
    given = []

    @agents.function_tool
    def weather(unit: Literal["celsius", "kelvin"]) -> str:
        """Tell the weather."""
        given.append(unit)
        return "rain"

    own = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=ALICE, max_retries=0, timeout=WAIT_S)
    forced = agents.ModelSettings(
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=200,
        temperature=0,
        extra_body={"logit_bias": unspaced},
    )
    agent = agents.Agent(
        "watch",
        model=agents.OpenAIChatCompletionsModel("tiny", own),
        tools=[weather],
        model_settings=forced,
        tool_use_behavior="stop_on_first_tool",
    )
    run = agents.Runner.run(agent, "Is it cold?", run_config=agents.RunConfig(tracing_disabled=True))
    assert asyncio.run(run).final_output == "rain"
    assert given in (["celsius"], ["kelvin"])
