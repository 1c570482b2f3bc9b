"""The loop of chat and tools: with solutions played as replies, and with whatever a model may write."""

import json

import pytest

from fulmen.agents.ladder import climb
from fulmen.agents.loop import ANSWER, NO_CALL, run_agent
from fulmen.agents.strategies import discard_all
from fulmen.messages.message import tool_steps
from fulmen.tasks.worlds.registry import tool_schemas
from fulmen.tasks.worlds.world import make_world


def call(name, arguments, number=0):
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    function = {"name": name, "arguments": text}
    calls = [{"id": f"c{number}", "type": "function", "function": function}]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def played(world, answer=None):
    """A chat that goes the way of the solution."""
    calls = [*world.solution, (ANSWER, {"answer": world.answer if answer is None else answer})]
    replies = [call(name, arguments, number) for number, (name, arguments) in enumerate(calls)]
    return lambda messages, tools, choice: replies.pop(0)


def scripted(*replies):
    left, seen = list(replies), []

    def chat(messages, tools, choice):
        seen.append((list(messages), choice))
        return left.pop(0)

    return chat, seen


@pytest.mark.parametrize("level", [1, 4, 7])
def test_the_solution_as_replies_solves_the_world(level):
    world = make_world(0, level)
    registry = world.start()
    run = run_agent(played(world), registry.call, world.messages, tool_schemas())
    assert world.score(run.answer, registry).strict == 1
    assert run.steps == len(world.solution) + 1
    assert len(tool_steps(run.messages[:-1])) == len(world.solution)
    assert discard_all(run.messages[:-1], 10**6, len) == list(run.messages[:-1])


def test_only_an_answer_is_asked_for_in_the_last_step():
    world = make_world(0, 1)
    looks = [call("get", {"id": "S1"}, number) for number in range(3)]
    chat, seen = scripted(*looks)
    run = run_agent(chat, world.start().call, world.messages, tool_schemas(), max_steps=3)
    assert (run.answer, run.steps) == (None, 3)
    assert [choice for _, choice in seen[:2]] == ["required"] * 2
    assert seen[2][1]["function"]["name"] == ANSWER


def test_what_is_no_call_or_no_json_is_told_to_the_model():
    world = make_world(0, 1)
    said = {"role": "assistant", "content": ""}
    chat, seen = scripted(call("get", '{"id": '), said, call("get", "[]", 1), call(ANSWER, {"answer": "x"}))
    run = run_agent(chat, world.start().call, world.messages, tool_schemas())
    assert run.answer == "x"
    results = [message["content"] for message in run.messages if message["role"] == "tool"]
    assert all("error" in json.loads(result) for result in results)
    assert seen[2][0][-1] == {"role": "user", "content": NO_CALL}
    for message in run.messages:
        for one in message.get("tool_calls", ()):
            assert isinstance(json.loads(one["function"]["arguments"]), dict)


def test_a_long_result_is_shortened_and_says_so():
    chat, seen = scripted(call("get", {}), call(ANSWER, {"answer": "x"}))
    run_agent(chat, lambda name, arguments: "a" * 10_000_000, [], tool_schemas(), result_limit=100)
    assert seen[1][0][-1]["content"] == "a" * 100 + "\n[9,999,900 more letters are left out]"


def test_an_answer_in_text_counts():
    chat, _ = scripted({"role": "assistant", "content": " Rome "})
    assert run_agent(chat, str, [], []).answer == "Rome"


def test_the_ladder_keeps_what_some_model_solves_and_ends_where_none_does():
    def able(highest):
        return lambda world, attempt: world.level <= highest and (world.index + attempt) % 2 == 0

    rungs = list(climb([able(1), able(2)], per_level=4, attempts=1))
    assert [(rung.level, len(rung.kept), rung.tried) for rung in rungs] == [(1, 2, 4), (2, 2, 4), (3, 0, 4)]
    assert all(world.index % 2 == 0 for world in rungs[0].kept)
    assert len(next(climb([able(1)], per_level=4, attempts=2)).kept) == 4
