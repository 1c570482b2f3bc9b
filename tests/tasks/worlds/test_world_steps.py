"""Worlds call by call: what is told after each, what solves them, and what is no call."""

import json

import pytest

from fulmen.errors import ConfigError
from fulmen.tasks import named
from fulmen.tasks.base import HELD_OUT, TURN, Score, conversation
from fulmen.tasks.worlds.steps import NO_CALL, TURNS
from fulmen.tasks.worlds.world import LEVELS

RIGHT, WRONG = Score(1.0, 1.0), Score(0.0, 0.0)


def call(tool, **arguments):
    return json.dumps({"tool": tool, "arguments": arguments})


@pytest.mark.parametrize("level", range(1, LEVELS + 1))
def test_solutions_are_right_and_each_turn_is_told_its_calls_result(level):
    task = named(f"world_steps:level={level}")
    for index in (*range(8), *range(HELD_OUT, HELD_OUT + 4)):
        problem = task.problem(index)
        turns, registry = problem.answer.split(TURN), problem.data["world"].start()
        for number, turn in enumerate(turns[:-1], 1):
            made = json.loads(turn)
            expected = registry.call(made["tool"], made["arguments"])
            assert task.told(problem, TURN.join(turns[:number])) == expected
        assert task.told(problem, problem.answer) is None
        assert task.score(problem, problem.answer) == RIGHT
        assert task.score(problem, TURN.join(turns[:-1])) == WRONG
        wordy = call("answer", text=f"It is {problem.data['world'].answer}, I think")
        assert task.score(problem, TURN.join([*turns[:-1], wordy])) == Score(0.0, 1.0)
        # What was not looked up is a guess, whatever comes after it.
        assert task.score(problem, TURN.join([turns[-1], *turns])) == WRONG
        assert task.score(problem, turns[-1]) == WRONG
        assert task.score(problem, TURN.join([call("get", id="S99"), turns[-1]])) == WRONG


def test_a_change_must_be_made_once():
    task = named("world_steps:level=7")
    problem = task.problem(0)
    *turns, load, answer = problem.answer.split(TURN)
    assert json.loads(load)["tool"] == "load"
    assert task.score(problem, TURN.join([*turns, load, load, answer])) == WRONG
    assert task.score(problem, TURN.join([*turns, answer])) == WRONG


@pytest.mark.parametrize(
    "turn",
    [
        "",
        "find the ship",
        "{",
        "[]",
        "{}",
        '{"tool": "find"}',
        '{"tool": 3, "arguments": {}}',
        '{"tool": "get", "arguments": ["S1"]}',
        '{"a": ' * 100_000,
    ],
)
def test_what_is_no_call_is_told_so_and_the_work_goes_on(turn):
    task = named("world_steps")
    problem = task.problem(0)
    assert task.told(problem, turn) == NO_CALL
    assert task.score(problem, turn) == WRONG
    assert task.score(problem, TURN.join([turn, problem.answer])) == RIGHT


@pytest.mark.parametrize("tool", ["sink", "answers", "sum"])
def test_tools_that_there_are_not(tool):
    task = named("world_steps")
    problem = task.problem(0)
    told = json.loads(task.told(problem, call(tool, id="S1")))
    assert tool in told["error"]


def test_words_around_a_call_and_thoughts_before_it_do_no_harm():
    task = named("world_steps")
    problem = task.problem(3)
    turns = [f'{{"perhaps"}}</think>I call {turn} now. {{"x": 1}}' for turn in problem.answer.split(TURN)]
    assert task.score(problem, TURN.join(turns)) == RIGHT


def test_a_conversation_has_each_turn_behind_what_was_told():
    task = named("world_steps:level=2")
    problem = task.problem(1)
    turns, said = problem.answer.split(TURN), conversation(task, problem, problem.answer)
    assert said[0] == problem.messages[0]
    assert [one["role"] for one in said[1:]] == [*["assistant", "user"] * (len(turns) - 1), "assistant"]
    assert [one["content"] for one in said[1::2]] == turns
    assert [one["content"] for one in said[2::2]] == [
        task.told(problem, TURN.join(turns[:number])) for number in range(1, len(turns))
    ]


@pytest.mark.parametrize("level", range(1, 6))
def test_there_are_turns_enough_for_the_first_levels(level):
    task = named(f"world_steps:level={level}")
    assert max(len(task.problem(index).answer.split(TURN)) for index in range(60)) <= TURNS


@pytest.mark.parametrize("spec", ["level=0", "level=8", "turns=0", "turns=1.5", "depth=2"])
def test_levels_and_turns_that_cannot_be(spec):
    with pytest.raises(ConfigError):
        named(f"world_steps:{spec}")
