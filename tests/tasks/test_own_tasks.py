"""A user's function, class or object as a task."""

import time
from types import SimpleNamespace

import pytest

from fulmen.errors import ConfigError
from fulmen.tasks import named
from fulmen.tasks.base import HELD_OUT, Score
from fulmen.tasks.own import given_task

MINE = """
from fulmen.tasks.base import Problem, Score

def doubled(index, factor=2):
    return {"prompt": f"{factor} times {index}?", "answer": str(factor * index)}

def shortest(index):
    messages = [{"role": "user", "content": f"Be brief about {index}."}]
    return {"prompt": messages, "score": lambda reply: 1 / (1 + len(reply))}

def wrong(index):
    return "a string"

class Echo:
    def __init__(self, word="hi"):
        self.name, self.word = f"echo-{word}", word
    def problem(self, index):
        return Problem(self.name, index, ({"role": "user", "content": self.word},), self.word)
    def score(self, problem, reply):
        return Score(float(reply == self.word), float(self.word in reply))

echo = Echo()
"""


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    file = tmp_path_factory.mktemp("own") / "mine.py"
    file.write_text(MINE)
    return f"python:{file}"


def test_a_function_with_answers(mine):
    task = named(f"{mine}:doubled:factor=3")
    problem = task.problem(4)
    assert "<answer>" in problem.messages[0]["content"]
    assert task.score(problem, problem.answer) == Score(1.0, 1.0)
    assert task.score(problem, f"It is {problem.data['answer']}.") == Score(0.0, 1.0)
    assert task.score(problem, "no") == Score(0.0, 0.0)
    assert {task.problem(i).answer for i in range(9)}.isdisjoint(
        task.problem(HELD_OUT + i).answer for i in range(9)
    )


def test_a_function_with_its_own_score(mine):
    task = named(f"{mine}:shortest")
    problem = task.problem(0)
    assert "<answer>" not in problem.messages[0]["content"]
    assert task.score(problem, "abc") == Score(0.25, 0.25)


@pytest.mark.parametrize(("name", "word"), [("echo", "hi"), ("Echo", "hi"), ("Echo:word=ho", "ho")])
def test_an_object_and_a_class(mine, name, word):
    task = named(f"{mine}:{name}")
    assert task.name == f"echo-{word}"
    assert task.score(task.problem(0), word) == Score(1.0, 1.0)


def test_a_function_that_returns_something_else(mine):
    with pytest.raises(ConfigError, match="not a mapping with prompt"):
        named(f"{mine}:wrong").problem(0)
    with pytest.raises(ConfigError, match=r"its score is 0\.5, not a function"):
        given_task(lambda index: {"prompt": "", "score": 0.5}).problem(0)
    with pytest.raises(ConfigError, match="cannot be made"):
        named(f"{mine}:Echo:volume=3")


@pytest.mark.parametrize("prompt", [["hi"], "half a pair: \ud800", 5], ids=repr)
def test_a_prompt_that_is_none(prompt):
    with pytest.raises(ConfigError, match="has no problem 0"):
        given_task(lambda index: {"prompt": prompt, "answer": "x"}).problem(0)


def test_a_function_that_hangs(monkeypatch):
    monkeypatch.setattr("fulmen.tasks.own.SECONDS", 0.05)
    task = given_task(lambda index: time.sleep(30))
    with pytest.raises(ConfigError, match=r"problem 3 took more than 0\.05 s to make"):
        task.problem(3)


def test_a_file_with_a_mistake(tmp_path):
    file = tmp_path / "broken.py"
    file.write_text("def task(:")
    with pytest.raises(ConfigError, match=r"broken.py cannot be imported"):
        named(f"python:{file}:task")


def test_turns_without_what_is_told_between_them():
    task = SimpleNamespace(
        name="relay", turns=3, problem=lambda index: None, score=lambda problem, reply: None
    )
    with pytest.raises(ConfigError, match=r"'relay' has turns=3 and no told\(\)"):
        given_task(task)
    task.told = lambda problem, reply: None
    assert given_task(task) is task
