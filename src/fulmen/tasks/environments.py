"""Environments of others as tasks: a data set of prompts and a rubric of reward functions, one turn.

The interface is that of the package `verifiers` (PrimeIntellect-ai/verifiers, up to 0.1.15; not its v1),
which need not be installed: whatever has it will do. `verifiers.load_environment(...)` returns such objects.
"""

import asyncio
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

from fulmen.errors import ConfigError, first_line
from fulmen.tasks.base import HELD_OUT, Problem, Score
from fulmen.tasks.split import is_held_out, text_of

# For a reward that is a coroutine's.
SECONDS = 30.0
# Parameters by which a rubric knows a function that scores a whole group at once.
OF_GROUPS = {"states", "prompts", "completions", "answers", "tasks", "infos"}


class Environment(Protocol):
    """What is asked of an environment: `dataset` or `get_dataset()`, and a `rubric` with `funcs`, `weights`.

    A row has `prompt`, a string or messages, or `question`; and what its functions ask for, as `answer`.
    `eval_dataset`, `system_prompt`, `parser` and more are used where they are there.
    """

    rubric: Any


class RewardFunction(NamedTuple):
    """One function of a rubric, its weight, and the objects that it may ask for by name."""

    function: Callable[..., Any]
    weight: float
    objects: Mapping[str, Any]


class EnvironmentTask:
    """An environment of one turn.

    Its rows are split by their text as all problems are, unless it has rows for evaluation; each side's come
    again when all have been. A reply is worth the weighted sum of the rewards over the sum of the weights
    above 0, within 0 and 1, strict and lenient alike.
    """

    def __init__(self, name: str, environment: Any) -> None:
        """Raises ConfigError for one without rows or rewards, of several turns, or that scores groups."""
        self.name = name
        turns = getattr(environment, "max_turns", 1)
        if turns != 1:
            raise ConfigError(
                f"task {name!r} has max_turns={turns}, and replies here are of one turn; give an environment "
                "of one (SingleTurnEnv), or a task of your own with turns and told()"
            )
        self._rewards = reward_functions(name, environment)
        self._training, self._held_out = split_problems(name, environment)

    def problem(self, index: int) -> Problem:
        """As `Task.problem`."""
        side = self._held_out if index >= HELD_OUT else self._training
        return replace(side[index % HELD_OUT % len(side)], index=index)

    def score(self, problem: Problem, reply: str) -> Score:
        """As `Task.score`, but for what the environment's functions raise."""
        row = problem.data["row"]
        completion = [{"role": "assistant", "content": reply}]
        given = {**row, "prompt": list(problem.messages), "completion": completion}
        given |= {"answer": row.get("answer", ""), "info": row.get("info") or {}, "task": row.get("task")}
        given["state"] = {**given, "input": row, "trajectory": []}
        worth = sum(
            one.weight * _settled(_called(one.function, {**given, **one.objects})) for one in self._rewards
        )
        share = worth / sum(max(one.weight, 0.0) for one in self._rewards)
        # A reward that is no number stays none: it is left out, and counted.
        within = share if share != share else min(1.0, max(0.0, share))
        return Score(within, within)


def is_environment(found: Any) -> bool:
    """Whether something looks like an environment: it has rows or a rubric, and no `score` of its own."""
    has = [hasattr(found, name) for name in ("rubric", "dataset", "get_dataset")]
    return any(has) and not callable(getattr(found, "score", None))


def reward_functions(name: str, environment: Any) -> list[RewardFunction]:
    """The functions of an environment's rubric whose weight is not 0, those of a group of rubrics too.

    Raises ConfigError if there are none with a weight above 0, and for one that scores groups.
    """
    found = [one for one in _functions(getattr(environment, "rubric", None)) if one.weight]
    if not any(one.weight > 0 for one in found):
        raise ConfigError(
            f"task {name!r} is an environment without a verifier: its rubric has no function with a weight "
            "above 0; give it one that scores a completion"
        )
    for one in found:
        if OF_GROUPS & inspect.signature(one.function).parameters.keys():
            raise ConfigError(
                f"task {name!r}: {_named(one.function)} scores a whole group of replies, and each is scored "
                "by itself here; give functions of one completion"
            )
    return found


def split_problems(name: str, environment: Any) -> tuple[list[Problem], list[Problem]]:
    """An environment's problems for training, and those that are held out, each text once and on one side.

    Raises ConfigError if either has none.
    """
    made = {text_of(one): one for one in _problems(name, environment, _rows(name, environment))}
    own = _own_evaluation(environment)
    if own is None:
        held_out = {text: one for text, one in made.items() if is_held_out(one)}
    else:
        held_out = {text_of(one): one for one in _problems(name, environment, own)}
    training = [one for text, one in made.items() if text not in held_out]
    if not training or not held_out:
        side = "evaluation" if training else "training"
        raise ConfigError(
            f"task {name!r} has no rows for {side} (of {len(made)} different prompts a quarter is held out, "
            "or what its eval_dataset has); give it more rows"
        )
    return training, list(held_out.values())


def _functions(rubric: Any) -> Iterator[RewardFunction]:
    objects = dict(getattr(rubric, "class_objects", None) or {})
    if (parser := getattr(rubric, "parser", None)) is not None:
        objects.setdefault("parser", parser)
    functions, weights = getattr(rubric, "funcs", None) or [], getattr(rubric, "weights", None) or []
    for function, weight in zip(functions, weights or [1.0] * len(functions), strict=True):
        yield RewardFunction(function, float(weight), objects)
    for part in getattr(rubric, "rubrics", None) or []:
        yield from _functions(part)


def _rows(name: str, environment: Any) -> Sequence[Any]:
    try:
        get = getattr(environment, "get_dataset", None)
        rows = get() if callable(get) else environment.dataset
        return list(rows)
    except Exception as error:  # the environment's own code
        raise ConfigError(
            f"task {name!r}: its rows cannot be had ({first_line(error)}); give it a data set"
        ) from error


def _own_evaluation(environment: Any) -> Sequence[Any] | None:
    """Rows that an environment keeps for evaluation; it may make them when it is asked."""
    own = [getattr(environment, name, None) for name in ("eval_dataset", "eval_dataset_source")]
    if all(one is None for one in own):
        return None
    get = getattr(environment, "get_eval_dataset", None)
    return list(get() if callable(get) else own[0] or [])


def _problems(name: str, environment: Any, rows: Sequence[Any]) -> Iterator[Problem]:
    system = getattr(environment, "system_prompt", None)
    for number, row in enumerate(rows):
        asked = row.get("prompt") or row.get("question") if isinstance(row, Mapping) else None
        if not asked:
            raise ConfigError(f"task {name!r}: row {number} has no prompt and no question; give it one")
        if isinstance(asked, str):
            asked = [{"role": "user", "content": asked}]
            asked = [{"role": "system", "content": system}, *asked] if system else asked
        # Data sets fill up what only some of their messages have.
        messages = tuple(
            {key: value for key, value in dict(one).items() if value is not None} for one in asked
        )
        yield Problem(name, number, messages, data={"row": dict(row)})


def _called(function: Callable[..., Any], given: Mapping[str, Any]) -> Any:
    """A function's result, given what it asks for by name."""
    parameters = inspect.signature(function).parameters
    if any(one.kind is one.VAR_KEYWORD for one in parameters.values()):
        return function(**given)
    return function(**{name: value for name, value in given.items() if name in parameters})


def _settled(worth: Any) -> float:
    """A reward; a coroutine's in a thread of its own, since a notebook's has a loop already."""
    if not inspect.isawaitable(worth):
        return float(worth)
    with ThreadPoolExecutor(1) as pool:
        return float(pool.submit(asyncio.run, _awaited(worth)).result())


async def _awaited(worth: Any) -> Any:
    return await asyncio.wait_for(worth, SECONDS)


def _named(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", repr(function))
