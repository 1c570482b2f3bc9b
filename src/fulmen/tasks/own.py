"""Tasks of the user's own, a Python function, an object or an environment (`fulmen.tasks.environments`).

By name they are `python:MODULE:NAME` or `python:FILE.py:NAME`; a module may be a file in the current folder.

The code is the user's and runs as it is, like any program of theirs.
"""

import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from fulmen.errors import ConfigError, FulmenError, first_line
from fulmen.tasks.base import Problem, Score, Task, turns_of
from fulmen.tasks.environments import Environment, EnvironmentTask, is_environment
from fulmen.tasks.forms import ASKED, candidates, in_form, inside_form
from fulmen.tasks.parameters import parse_parameters
from fulmen.tasks.rewards import TookTooLongError, time_limit
from fulmen.tasks.split import problem_at

# What a program may give as a task.
GivenTask = str | Task | Environment | Callable[..., Any]
PREFIX = "python:"
# For making one problem.
SECONDS = 60.0
_PLACE = re.compile(r"(?P<module>.+\.py|[\w.]+):(?P<name>\w+)(?::(?P<parameters>.*))?")


class FunctionTask:
    """A task of a function of a number, which returns a mapping.

    It has `prompt` (a string, or chat messages), and `answer`, which is asked for between <answer> and
    </answer>, and compared without case and spacing; or `score`, a function of the reply that returns 0 to 1,
    or a `Score`, and then nothing is added to the prompt.
    """

    def __init__(
        self, name: str, make: Callable[..., Mapping[str, Any]], parameters: Mapping[str, Any]
    ) -> None:
        self.name = name
        self._make, self._parameters = make, parameters

    def problem(self, index: int) -> Problem:
        """As `Task.problem`. Raises ConfigError for a function that hangs or returns something else."""
        try:
            with time_limit(SECONDS):
                return problem_at(index, self.name, self._numbered)
        except TookTooLongError:
            raise ConfigError(
                f"task {self.name!r}: problem {index} took more than {SECONDS:g} s to make; make it quicker"
            ) from None

    def score(self, problem: Problem, reply: str) -> Score:
        """As `Task.score`, but for what the user's function raises."""
        if "score" in problem.data:
            worth = problem.data["score"](reply)
            return worth if isinstance(worth, Score) else Score(float(worth), float(worth))
        right = _plain(problem.data["answer"])
        strict = float(_plain(inside_form(reply) or "") == right)
        return Score(strict, max(strict, float(any(_plain(piece) == right for piece in candidates(reply)))))

    def _numbered(self, number: int) -> Problem:
        made = self._make(number, **self._parameters)
        if not isinstance(made, Mapping) or "prompt" not in made or not {"answer", "score"} & made.keys():
            raise TypeError(f"it returned {made!r:.80}, not a mapping with prompt, and answer or score")
        scored, prompt = "score" in made, made["prompt"]
        if scored and not callable(made["score"]):
            raise TypeError(f"its score is {made['score']!r:.80}, not a function of the reply")
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt if scored else f"{prompt}\n\n{ASKED}"}]
        answer = str(made.get("answer", ""))
        data = {"score": made["score"]} if scored else {"answer": answer}
        return Problem(self.name, number, tuple(prompt), answer if scored else in_form(answer), data)


def own_task(spec: str) -> Task:
    """The task of `python:PLACE:NAME[:key=value,…]`: a function of a number, a `Task`, or what makes one.

    Raises ConfigError for a place that cannot be imported, and for what is no task.
    """
    match = _PLACE.fullmatch(spec.removeprefix(PREFIX))
    if match is None:
        raise ConfigError(f"task {spec!r} cannot be read; write python:FILE.py:NAME or python:MODULE:NAME")
    found = getattr(_module(spec, match["module"]), match["name"], None)
    if found is None:
        raise ConfigError(f"task {spec!r}: {match['module']} has no {match['name']}; name what it defines")
    return made_task(spec, found, parse_parameters(spec, match["parameters"] or ""))


def given_task(found: Any) -> Task:
    """What a program gave as a task, by its own name. Raises ConfigError for what is none."""
    names = (getattr(found, name, None) for name in ("name", "env_id", "__name__"))
    return made_task(next(filter(None, names), type(found).__name__), found, {})


def made_task(name: str, found: Any, parameters: Mapping[str, Any]) -> Task:
    """The task that something is: a function of `index`, a `Task`, an environment, or what makes one.

    Raises ConfigError for what is none of them, and for an environment that cannot train.
    """
    if inspect.isfunction(found) and "index" in inspect.signature(found).parameters:
        return FunctionTask(name, found, parameters)
    is_factory = inspect.isclass(found) or inspect.isfunction(found)
    task = _called(name, found, parameters) if is_factory else found
    if is_environment(task):
        return EnvironmentTask(name, task)
    if not all(callable(getattr(task, method, None)) for method in ("problem", "score")):
        raise ConfigError(
            f"task {name!r}: {found!r:.60} is no task; give a function of index, an object with problem() "
            "and score(), or an environment with a dataset and a rubric"
        )
    if turns_of(task) != 1 and not callable(getattr(task, "told", None)):
        raise ConfigError(
            f"task {name!r} has turns={turns_of(task)} and no told(); say what is told in between"
        )
    task.name = getattr(task, "name", name)
    return task


def _called(spec: str, factory: Callable[..., Any], parameters: Mapping[str, Any]) -> Any:
    try:
        return factory(**parameters)
    except FulmenError:
        raise
    except Exception as error:
        raise ConfigError(f"task {spec!r} cannot be made ({first_line(error)}); mend it") from error


def _module(spec: str, place: str) -> ModuleType:
    try:
        if place.endswith(".py"):
            return _from_file(Path(place).expanduser())
        # The installed program does not look for modules in the current folder, as Python does.
        here = Path(*place.split(".")).with_suffix(".py")
        return _from_file(here) if here.exists() else importlib.import_module(place)
    except Exception as error:
        raise ConfigError(
            f"task {spec!r}: {place} cannot be imported ({first_line(error)}); mend it"
        ) from error


def _from_file(path: Path) -> ModuleType:
    name = f"fulmen_task:{path.resolve()}"
    if name in sys.modules:
        return sys.modules[name]
    found = importlib.util.spec_from_file_location(name, path)
    assert found is not None
    assert found.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(found)
    try:
        found.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
