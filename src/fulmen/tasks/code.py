"""Python functions to write, tried on inputs in the sandbox (`fulmen.tasks.sandbox`)."""

import random
import re
from collections.abc import Mapping
from typing import Any

from fulmen.errors import ConfigError
from fulmen.tasks.base import Problem, Score
from fulmen.tasks.code_families import draw_exercise
from fulmen.tasks.forms import without_thinking
from fulmen.tasks.parameters import checked_parameters
from fulmen.tasks.sandbox import SandboxLimits, require_isolation, run_calls
from fulmen.tasks.split import problem_at

PROMPT = """Write a Python function `{name}({arguments})` that {does}.

Example: {name}({example}) returns {value!r}.

Reply with the function in a block that begins with ```python and ends with ```."""
_BLOCK = re.compile(r"```(?:python|py)[ \t]*\n(.*?)```", re.DOTALL)
_ANY_BLOCK = re.compile(r"```\w*[ \t]*\n?(.*?)(?:```|\Z)", re.DOTALL)


class CodeTask:
    """Small functions made up by code (`code_families`), with unit tests that the model does not see.

    A reply is right if the function of its last block of Python returns what it should for all tests;
    leniently it may stand anywhere.
    """

    def __init__(self, spec: str, parameters: Mapping[str, Any]) -> None:
        """Raises ConfigError for parameters that cannot be, SandboxError where code cannot be isolated."""
        self.name = spec
        settings: dict[str, Any] = {"tests": 8, "seconds": 5.0, "isolation": "namespaces"}
        settings |= checked_parameters(spec, parameters, settings)
        self._tests, self._isolation = settings["tests"], settings["isolation"]
        self._limits = SandboxLimits(seconds=settings["seconds"])
        if not (2 <= self._tests <= 100 and 0 < self._limits.seconds <= 600):
            raise ConfigError(f"task {spec!r} cannot be; take 2 to 100 tests, and up to 600 seconds")
        require_isolation(self._isolation)

    def problem(self, index: int) -> Problem:
        """As `Task.problem`."""
        return problem_at(index, self.name, self._numbered)

    def score(self, problem: Problem, reply: str) -> Score:
        """As `Task.score`."""
        strict_code, lenient_code = python_blocks(reply), likely_code(reply, problem.data["function"])
        strict = self._is_right(problem, strict_code[-1]) if strict_code else False
        if strict or (strict_code and strict_code[-1] == lenient_code):
            return Score(float(strict), float(strict))
        return Score(0.0, float(self._is_right(problem, lenient_code)))

    def _numbered(self, number: int) -> Problem:
        exercise = draw_exercise(random.Random(f"code {number}"), self._tests)
        namespace: dict[str, Any] = {}
        exec(exercise.source, namespace)  # our own
        expected = tuple(namespace[exercise.name](*arguments) for arguments in exercise.inputs)
        prompt = PROMPT.format(
            **{"name": exercise.name, "arguments": exercise.arguments, "does": exercise.does},
            **{"example": ", ".join(map(repr, exercise.inputs[1])), "value": expected[1]},
        )
        data = {"function": exercise.name, "inputs": exercise.inputs, "expected": expected}
        answer = f"```python\n{exercise.source}\n```"
        return Problem(self.name, number, ({"role": "user", "content": prompt},), answer, data)

    def _is_right(self, problem: Problem, code: str) -> bool:
        name = problem.data["function"]
        if not re.search(rf"\b{name}\b", code):  # nothing to run
            return False
        ran = run_calls(code, name, problem.data["inputs"], self._limits, self._isolation)
        return ran.values == problem.data["expected"]


def python_blocks(reply: str) -> list[str]:
    """What stands in the blocks of Python of a reply, after its reasoning."""
    return [block.strip("\n") for block in _BLOCK.findall(without_thinking(reply))]


def likely_code(reply: str, function: str) -> str:
    """The code of a reply wherever it is: the last block with the function, or all from its definition on."""
    text = without_thinking(reply)
    blocks = [block.strip("\n") for block in _ANY_BLOCK.findall(text) if f"def {function}" in block]
    if blocks:
        return blocks[-1]
    lines = text[max(0, text.find(f"def {function}")) :].splitlines()
    body = lines[1:2]
    for line in lines[2:]:
        if line.strip() and not line[0].isspace():
            break
        body.append(line)
    return "\n".join([*lines[:1], *body])
