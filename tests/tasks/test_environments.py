"""Environments with the interface of `verifiers`, as tasks."""

import math
from types import SimpleNamespace

import pytest
from datasets import Dataset

from fulmen.errors import ConfigError
from fulmen.tasks import named
from fulmen.tasks.base import HELD_OUT, Score
from fulmen.tasks.environments import EnvironmentTask
from fulmen.tasks.own import given_task
from fulmen.tasks.split import text_of

ROWS = [{"question": f"{n} plus 1?", "answer": str(n + 1)} for n in range(40)]


def right(completion, answer):
    return float(completion[-1]["content"].strip() == answer)


async def short(completion, parser, state, **more):
    assert state["prompt"] == more["prompt"]
    return 1.0 if len(parser(completion[0]["content"])) < 4 else 0.0


def seen(prompt, info, task):
    raise AssertionError("a weight of 0 is a metric")


def broken(completion):
    return math.nan


def rubric(funcs=(right, short, seen), weights=(1.0, 0.25, 0.0), **more):
    return SimpleNamespace(funcs=list(funcs), weights=list(weights), parser=str, **more)


def environment(rows=ROWS, **more):
    return SimpleNamespace(dataset=rows, **{"rubric": rubric(), "max_turns": 1, **more})


def test_rewards_are_weighed_and_asked_for_by_name():
    task = EnvironmentTask("sums", environment(system_prompt="Be brief."))
    problem = task.problem(0)
    assert [message["role"] for message in problem.messages] == ["system", "user"]
    answer = problem.data["row"]["answer"]
    assert task.score(problem, answer) == Score(1.0, 1.0)
    assert task.score(problem, f"   {answer}   ") == Score(0.8, 0.8)
    assert task.score(problem, "no") == Score(0.2, 0.2)
    assert task.score(problem, "I do not know") == Score(0.0, 0.0)


def test_rows_are_split_by_their_text_and_come_again():
    task = EnvironmentTask("sums", environment())
    training, held_out = ({text_of(task.problem(i)) for i in range(n, n + 80)} for n in (0, HELD_OUT))
    assert training | held_out == {row["question"] for row in ROWS}
    assert training.isdisjoint(held_out)
    assert task.problem(HELD_OUT + 3).index == HELD_OUT + 3


def test_a_data_set_of_messages_with_rows_for_evaluation():
    def asked(n):
        return [{"role": "user", "content": f"{n} plus 1?", "name": None}]

    rows = Dataset.from_list([{"prompt": asked(n), "answer": str(n + 1), "info": {"n": n}} for n in range(6)])
    made = SimpleNamespace(
        get_dataset=lambda: rows,
        get_eval_dataset=lambda: rows.select(range(4, 6)),
        eval_dataset_source=object(),
        rubric=SimpleNamespace(funcs=[], rubrics=[rubric(), rubric([broken], [-0.5])]),
        env_id="owner/sums",
    )
    task = given_task(made)
    assert task.name == "owner/sums"
    assert {task.problem(i).data["row"]["answer"] for i in range(9)} == {"1", "2", "3", "4"}
    assert {task.problem(HELD_OUT + i).data["row"]["answer"] for i in range(9)} == {"5", "6"}
    assert task.problem(0).messages == ({"role": "user", "content": "0 plus 1?"},)
    assert math.isnan(task.score(task.problem(0), "1").strict)


def test_by_name_from_a_file_in_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sums_environment.py").write_text(
        "from types import SimpleNamespace\n"
        "def right(completion, answer): return completion[0]['content'] == answer\n"
        "def load_environment(count=20):\n"
        "    rows = [{'prompt': str(n), 'answer': str(n)} for n in range(count)]\n"
        "    return SimpleNamespace(dataset=rows, rubric=SimpleNamespace(funcs=[right], weights=[2.0]))\n"
    )
    task = named("python:sums_environment:load_environment:count=30")
    assert task.score(task.problem(2), task.problem(2).data["row"]["answer"]) == Score(1.0, 1.0)


def of_groups(completions, answers):
    return [0.0 for _ in completions]


def wrong_rows():
    raise OSError("no such data set")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rubric": None}, "without a verifier"),
        ({"rubric": rubric([], [])}, "without a verifier"),
        ({"rubric": rubric([right], [0.0])}, "without a verifier"),
        ({"rubric": rubric([of_groups], [1.0])}, "of_groups scores a whole group"),
        ({"max_turns": 10}, "max_turns=10"),
        ({"rows": []}, "no rows for training"),
        ({"rows": ROWS[:1], "eval_dataset": ROWS[:1]}, "no rows for training"),
        ({"rows": [{"text": "?"}]}, "row 0 has no prompt"),
        ({"get_dataset": wrong_rows}, "its rows cannot be had \\(no such data set\\)"),
    ],
)
def test_an_environment_that_cannot_train(changes, words):
    with pytest.raises(ConfigError, match=words):
        given_task(environment(**changes))
