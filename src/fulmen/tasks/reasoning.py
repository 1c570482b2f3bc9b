"""reasoning-gym's tasks, by their own names and parameters.

A problem comes from the task, its parameters and a number alone; answers are scored by its own function. Left
out are tasks for which one of these does not hold.
"""

import dataclasses
from collections.abc import Mapping
from functools import lru_cache
from types import ModuleType
from typing import Any

from fulmen.errors import ConfigError, first_line
from fulmen.tasks.base import Problem, Score
from fulmen.tasks.expressions import is_harmless
from fulmen.tasks.forms import ASKED, candidates, in_form, inside_form
from fulmen.tasks.parameters import checked_parameters
from fulmen.tasks.split import problem_at

_DIFFER = "its problems or answers differ from process to process"
LEFT_OUT = {
    "composite": "it mixes tasks; name them one by one",
    "game_of_life_halting": "its scorer takes any reply for right",
    "propositional_logic": "its problems have no answers",
    **dict.fromkeys(("codeio", "intermediate_integration", "isomorphic_strings", "knight_swap"), _DIFFER),
    **dict.fromkeys(("list_functions", "polynomial_multiplication", "ransom_note", "word_ladder"), _DIFFER),
}
# Their scorers evaluate what the model wrote.
EVALUATED = {
    *("binary_matrix", "countdown", "n_queens", "puzzle24"),
    *("simple_integration", "spiral_matrix", "string_insertion"),
}
# Some data sets make all of their problems, or a list of their kinds, when they are opened.
BLOCK = 1024
_LONGEST_REPLY = 100_000


class ReasoningTask:
    """One of reasoning-gym's tasks.

    Attributes:
        name: the spec, with the parameters.
    """

    def __init__(self, spec: str, dataset: str, parameters: Mapping[str, Any]) -> None:
        """Raises ConfigError for parameters that the task does not have or take."""
        self.name = spec
        self._dataset = dataset
        self._parameters = checked_parameters(spec, parameters, _defaults(dataset))
        self._open = lru_cache(maxsize=2)(self._opened)
        try:
            self._open(0)
        except (AssertionError, ValueError, TypeError) as error:
            raise ConfigError(
                f"task {spec!r} cannot be: {first_line(error)}; change that parameter"
            ) from error

    def problem(self, index: int) -> Problem:
        """As `Task.problem`; the prompt is reasoning-gym's question, and how to write the answer."""
        return problem_at(index, self.name, self._numbered)

    def score(self, problem: Problem, reply: str) -> Score:
        """As `Task.score`: reasoning-gym's own score, which may be partial, of the answer in its form.

        Leniently a reply is right in which any piece is wholly right, else worth what it is strictly.
        """
        reply = reply[:_LONGEST_REPLY]
        answer = inside_form(reply)
        strict = 0.0 if answer is None else self._worth(problem, answer)
        is_right = strict >= 1 or any(self._worth(problem, piece) >= 1 for piece in candidates(reply))
        return Score(strict, 1.0 if is_right else strict)

    def _numbered(self, number: int) -> Problem:
        entry = self._open(number // BLOCK)[number % BLOCK]
        prompt = f"{entry['question'].strip()}\n\n{ASKED}"
        answer = in_form(entry["answer"]) if isinstance(entry["answer"], str) else ""
        return Problem(self.name, number, ({"role": "user", "content": prompt},), answer, {"entry": entry})

    def _worth(self, problem: Problem, answer: str) -> float:
        entry = problem.data["entry"]
        if self._dataset in EVALUATED and answer != entry["answer"] and not is_harmless(answer):
            return 0.0
        try:
            worth = float(self._open(0).score_answer(answer, entry))
        except Exception:  # of one of a hundred scorers, for what a model wrote
            return 0.0
        return min(1.0, max(0.0, worth)) if worth == worth else 0.0

    def _opened(self, block: int) -> Any:
        return library().create_dataset(self._dataset, **self._parameters, seed=block * BLOCK, size=BLOCK)


def reasoning_names() -> list[str]:
    """Names of the tasks that can be used. Raises ConfigError without the package."""
    library()
    return sorted(_datasets().keys() - LEFT_OUT.keys())


def require_usable(name: str) -> None:
    """Raises ConfigError, with the reason, for a task of reasoning-gym that is left out."""
    if name in LEFT_OUT:
        raise ConfigError(f"task {name!r} cannot be used: {LEFT_OUT[name]}; take another one")


def library() -> ModuleType:
    """reasoning-gym, imported when it is asked for. Raises ConfigError without the package."""
    try:
        import reasoning_gym
    except ImportError as error:
        raise ConfigError(
            f"this task needs the package {error.name}; run: pip install 'fulmen[rl]'"
        ) from error
    return reasoning_gym


def _datasets() -> Mapping[str, Any]:
    from reasoning_gym.factory import DATASETS

    return DATASETS


def _defaults(dataset: str) -> dict[str, Any]:
    """A task's parameters; which problems there are is told by an index, not by a seed and a size."""
    fields = dataclasses.fields(_datasets()[dataset][1])
    made = {
        field.name: None
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        else field.default
        if field.default_factory is dataclasses.MISSING
        else field.default_factory()
        for field in fields
    }
    return {name: default for name, default in made.items() if name not in {"seed", "size"}}
