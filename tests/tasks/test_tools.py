"""Tool use: what calls come to, and what does not count as an answer."""

import json

import pytest

from fulmen.tasks import named
from fulmen.tasks.base import HELD_OUT, Score

TASK = named("tools")


def problem_with(calls):
    for index in range(HELD_OUT, HELD_OUT + 99):
        problem = TASK.problem(index)
        if len(json.loads(problem.answer[8:-9])) == calls:
            return problem
    raise AssertionError


@pytest.mark.parametrize("calls", [1, 2, 3, 5])
def test_the_solution_uses_tools_alone(calls):
    problem = problem_with(calls)
    assert TASK.score(problem, problem.answer) == Score(1.0, 1.0)
    assert TASK.score(problem, f"I call {problem.answer[8:-9]} now.") == Score(0.0, 1.0)
    assert str(problem.data["result"]) not in problem.answer


def test_another_order_is_as_right():
    problem = problem_with(3)
    first, second, last = json.loads(problem.answer[8:-9])
    last["arguments"] = last["arguments"][::-1]
    swapped = json.dumps([second, first, last])
    assert TASK.score(problem, f"<answer>{swapped}</answer>").strict == 1


@pytest.mark.parametrize(
    "calls",
    [
        [],
        {},
        [[]],
        [{"tool": "price"}],
        [{"tool": "price", "arguments": ["gold"]}],
        [{"tool": "price", "arguments": [["tea"]]}],
        [{"tool": "steal", "arguments": [1, 2]}],
        [{"tool": "add", "arguments": ["$2", 1]}],
        [{"tool": "add", "arguments": ["$x", 1]}],
        [{"tool": "multiply", "arguments": [10**12, 2]}],
        [{"tool": "multiply", "arguments": [True, 2]}],
        [{"tool": "price", "arguments": ["tea"]}] * 99,
    ],
)
def test_calls_that_cannot_be_score_nothing(calls):
    problem = problem_with(2)
    assert TASK.score(problem, f"<answer>{json.dumps(calls)}</answer>") == Score(0.0, 0.0)


def test_the_result_without_a_look_into_the_database_is_no_answer():
    problem = problem_with(2)
    guess = [{"tool": "add", "arguments": [problem.data["result"], 0]}]
    assert TASK.score(problem, f"<answer>{json.dumps(guess)}</answer>") == Score(0.0, 0.0)
    assert TASK.score(problem, "[" * 100_000 + "{") == Score(0.0, 0.0)
