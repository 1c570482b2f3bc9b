"""Worlds in one turn: plans that solve them, and what is no answer."""

import json

import pytest

from fulmen.errors import ConfigError
from fulmen.tasks import named
from fulmen.tasks.base import HELD_OUT, Score
from fulmen.tasks.worlds.world import LEVELS

RIGHT, WRONG = Score(1.0, 1.0), Score(0.0, 0.0)


def calls_of(problem):
    return json.loads(problem.answer[8:-9])


def reply(calls):
    return f"<answer>{json.dumps(calls)}</answer>"


@pytest.mark.parametrize("level", range(1, LEVELS + 1))
def test_plans_solve_their_worlds_and_say_no_result(level):
    task = named(f"world:level={level}")
    for index in (*range(12), *range(HELD_OUT, HELD_OUT + 6)):
        problem = task.problem(index)
        world = problem.data["world"]
        assert world.level == level
        assert task.score(problem, problem.answer) == RIGHT
        assert f'"{world.answer}"' not in problem.answer
        assert task.score(problem, f"I would call {json.dumps(calls_of(problem))}.") == Score(0.0, 1.0)
        # Not even the right text is an answer that nobody looked up.
        guess = [{"tool": "answer", "arguments": {"text": world.answer}}]
        assert task.score(problem, reply(guess)) == WRONG


def test_a_change_must_be_made_once():
    task = named("world:level=7")
    problem = task.problem(0)
    calls = calls_of(problem)
    (load,) = [number for number, call in enumerate(calls) if call["tool"] == "load"]
    assert task.score(problem, reply([*calls, calls[load]])) == WRONG
    left_out = [*calls[:load], {"tool": "cargo_of", "arguments": {"ship": "$5.id"}}, *calls[load + 1 :]]
    assert task.score(problem, reply(left_out)) == WRONG


@pytest.mark.parametrize(
    "calls",
    [
        [],
        {},
        [[]],
        ["find"],
        [{"tool": "find"}],
        [{"tool": "find", "arguments": ["ships", "S1"]}],
        [{"tool": "sink", "arguments": {}}],
        [{"tool": "get", "arguments": {"id": "$1.id"}}],
        [{"tool": "get", "arguments": {"id": "$x"}}],
        [{"tool": "get", "arguments": {"id": "S99"}}],
        [{"tool": "get", "arguments": {"id": ["S1"] * 999}}],
        [{"tool": "get", "arguments": {"id": "S1"}}, {"tool": "sum", "arguments": {"of": "$1"}}],
        [
            {"tool": "get", "arguments": {"id": "S1"}},
            {"tool": "lowest", "arguments": {"of": "$1", "by": "x"}},
        ],
        [{"tool": "get", "arguments": {"id": "S1"}}, {"tool": "answer", "arguments": {"text": "$1.x.y"}}],
        [{"tool": "get", "arguments": {"id": "S1"}}] * 21,
    ],
)
def test_calls_that_cannot_be_score_nothing(calls):
    task = named("world")
    assert task.score(task.problem(0), reply(calls)) == WRONG


@pytest.mark.parametrize("spec", ["world:level=0", "world:level=8", "world:depth=2"])
def test_levels_that_there_are_not(spec):
    with pytest.raises(ConfigError):
        named(spec)
