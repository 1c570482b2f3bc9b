"""Which problems are for evaluation: told by their text, so that no training problem is one of them."""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from fulmen.errors import ConfigError, first_line
from fulmen.tasks.base import HELD_OUT, Problem

# One text in so many is held out.
SHARE = 4
# Numbers tried for an index until a text falls on its side: of a task with texts enough one in 10^8 fails.
TRIES = 64


def text_of(problem: Problem) -> str:
    """All that a prompt says, without case and spacing: what makes two problems the same."""
    return text_of_messages(problem.messages)


def text_of_messages(messages: Iterable[Mapping[str, Any]]) -> str:
    """`text_of` a problem with these messages."""
    said = (str(message.get("content", "")) for message in messages)
    return " ".join(" ".join(said).casefold().split())


def is_held_out(problem: Problem) -> bool:
    """Whether a problem is for evaluation, whatever its index."""
    return int.from_bytes(hashlib.sha256(text_of(problem).encode()).digest()[:8], "big") % SHARE == 0


def problem_at(index: int, name: str, make: Callable[[int], Problem]) -> Problem:
    """The first problem for an index that is on the index's side of the split.

    Args:
        index: from `HELD_OUT` on problems are held out, else they are for training.
        name: of the task, for the error.
        make: the problem of a number; numbers of one index are `TRIES` after each other.

    Raises ConfigError if a task has not enough different problems, or cannot make any.
    """
    assert index >= 0
    first = index % HELD_OUT * TRIES
    reason = f"{TRIES} in a row are for {'training' if index >= HELD_OUT else 'evaluation'}"
    for number in range(first, first + TRIES):
        try:
            problem = make(number)
            is_on_its_side = is_held_out(problem) == (index >= HELD_OUT)
        except Exception as error:  # a generator that gives up on some numbers, or messages that are none
            reason = first_line(error)
            continue
        if is_on_its_side:
            return replace(problem, index=index)
    raise ConfigError(f"task {name} has no problem {index} ({reason}); give it other parameters")


def distinct_problems(task_problem: Callable[[int], Problem], first: int, count: int) -> list[Problem]:
    """The problems of `first` and the indices after it, each text once.

    At most `count`; fewer where twice as many indices and `TRIES` more do not have them.
    """
    found: dict[str, Problem] = {}
    for index in range(first, first + 2 * count + TRIES):
        if len(found) == count:
            break
        problem = task_problem(index)
        found.setdefault(text_of(problem), problem)
    return list(found.values())
