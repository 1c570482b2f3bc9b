"""Tasks by their names: what they make, where, and what cannot be."""

import json
import os
import subprocess
import sys

import pytest

from fulmen.errors import ConfigError
from fulmen.tasks import named, task_names
from fulmen.tasks.base import HELD_OUT
from fulmen.tasks.split import distinct_problems, text_of

SPECS = (
    "spell_backward:min_word_len=3,max_word_len=4",
    "chain_sum:max_terms=3,max_digits=1",
    "needle_haystack:min_num_statements=20,max_num_statements=30",
    "gsm_symbolic",
    "tools:max_calls=3",
    "world:level=7",
)
PRINT = """
import json, sys
from fulmen.tasks import named
tasks = [named(spec) for spec in json.loads(sys.argv[1])]
problems = [task.problem(int(index)) for task in tasks for index in sys.argv[2:]]
print(json.dumps([[problem.messages[0]["content"], problem.answer] for problem in problems]))
"""


def in_another_process(indices):
    command = [sys.executable, "-c", PRINT, json.dumps(SPECS), *map(str, indices)]
    ran = subprocess.run(
        command, capture_output=True, check=True, text=True, env={**os.environ, "PYTHONHASHSEED": "7"}
    )
    return json.loads(ran.stdout)


def test_a_problem_is_the_same_in_any_process_and_order():
    indices = (HELD_OUT + 3, 70, 2)
    other = in_another_process(indices)
    tasks = [named(spec) for spec in SPECS]
    backward = [
        [task.problem(i).messages[0]["content"], task.problem(i).answer]
        for task in tasks
        for i in indices[::-1]
    ]
    assert [one for at in range(len(SPECS)) for one in other[3 * at : 3 * at + 3][::-1]] == backward


@pytest.mark.parametrize("spec", SPECS)
def test_the_own_answer_is_right_and_its_form_is_what_strict_means(spec):
    task = named(spec)
    for index in (0, 11, HELD_OUT + 5):
        problem = task.problem(index)
        assert (problem.task, problem.index) == (spec, index)
        assert task.score(problem, problem.answer) == task.score(problem, f"So: {problem.answer}\n")
        assert task.score(problem, problem.answer).strict == 1
        bare = problem.answer.removeprefix("<answer>").removesuffix("</answer>")
        for reply in (bare, f"<answer>{bare}", f"{bare}\n<answer>-</answer>"):
            score = task.score(problem, reply)
            assert score.strict < 1, reply
            assert score.lenient == 1, reply
        for reply in ("", "<answer></answer>", "score 1", "\0", "<answer>" * 50):
            assert task.score(problem, reply).lenient < 1, reply


@pytest.mark.parametrize("spec", SPECS)
def test_no_held_out_problem_is_a_training_problem(spec):
    task = named(spec)
    trained = {text_of(task.problem(index)) for index in range(150)}
    held_out = {text_of(task.problem(HELD_OUT + index)) for index in range(50)}
    assert len(trained) > 50
    assert len(held_out) > 10
    assert not trained & held_out


def test_distinct_problems_have_each_text_once():
    task = named("chain_sum:min_terms=2,max_terms=2,min_digits=1,max_digits=1")
    problems = distinct_problems(task.problem, HELD_OUT, 30)
    assert len({text_of(problem) for problem in problems}) == 30
    # All there are, of more that were asked for.
    assert len(distinct_problems(task.problem, HELD_OUT, 500)) < 200


def test_a_task_with_too_few_problems_says_so():
    task = named(f"python:{__file__}:always_the_same")
    with pytest.raises(ConfigError, match=r"in a row are for|has no problem"):
        [task.problem(index) for index in (0, HELD_OUT)]


def always_the_same(index):
    return {"prompt": "Say yes.", "answer": "yes"}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("spell_bakward", "did you mean spell_backward"),
        ("spell_backward:max_len=5", "did you mean max_word_len"),
        ("spell_backward:max_word_len=many", "give int, as 10"),
        ("spell_backward:max_word_len=1", "max_word_len must be >="),
        ("spell_backward:size=3", "has no parameter size"),
        ("chain_sum:max_terms", "is no parameter"),
        ("chain_sum:max_terms=3,max_terms=4", "twice"),
        ("propositional_logic", "no answers"),
        ("game_of_life_halting", "any reply for right"),
        ("tools:min_calls=9", "no question has"),
        ("tools:calls=9", "has no parameter calls"),
        ("python:nowhere:task", "cannot be imported"),
        ("python:json:task", "has no task"),
        ("python:json:loads", "cannot be made"),
        ("python:json", "write python:FILE.py:NAME"),
        ("code:tests=1", "2 to 100 tests"),
        ("code:isolation=hope", "namespaces or limits"),
        (" ", "write NAME"),
    ],
)
def test_what_cannot_be_is_named(spec, message):
    with pytest.raises(ConfigError, match=message):
        named(spec)


def test_names_are_those_that_can_be_used():
    names = task_names()
    assert {"spell_backward", "tools", "gcd"} <= set(names)
    assert not {"propositional_logic", "composite", "ransom_note"} & set(names)
