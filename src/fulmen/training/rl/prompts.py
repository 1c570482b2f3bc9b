"""Problems as token ids, and the same problems again where a run goes on."""

from collections.abc import Sequence
from typing import Any

from fulmen.errors import ConfigError
from fulmen.tasks.base import Problem
from fulmen.training.prompts import prompt_ids
from fulmen.training.rl.settings import Domain


def training_rows(domains: Sequence[Domain], count: int) -> dict[str, list[Any]]:
    """Which problem each prompt of a run is: the tasks in turn, each one's problems from 0 on."""
    names = [domains[number % len(domains)].task.name for number in range(count)]
    return {"task": names, "index": [number // len(domains) for number in range(count)]}


def prompt_tokens(tokenizer: Any, problem: Problem) -> list[int]:
    """Token ids of a problem's messages, in the chat template; without one their plain text.

    Raises ConfigError if there are none.
    """
    ids = prompt_ids(tokenizer, problem.messages)
    if not ids:
        raise ConfigError(f"problem {problem.index} of task {problem.task} has no tokens; give it a message")
    return ids


def rows_by_length(tokenizer: Any, problems: Sequence[Problem], group: int, updates: int) -> list[int]:
    """Numbers of rows in the order of their prompts' lengths, as a pass is padded to its longest prompt.

    Args:
        problems: of each row; `group` rows have one, and stay together.
        updates: into so many parts the rows are split, each of which keeps its own.
    """
    firsts, part = range(0, len(problems), group), len(problems) // updates
    lengths = {first: len(prompt_tokens(tokenizer, problems[first])) for first in firsts}
    ordered = sorted(firsts, key=lambda first: (first // part, lengths[first]))
    return [row for first in ordered for row in range(first, first + group)]
