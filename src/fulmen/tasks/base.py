"""What a task is."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

# Problems with indices from here on are for evaluation: no stage trains on them.
HELD_OUT = 1_000_000_000


@dataclass(frozen=True)
class Problem:
    """One problem of a task.

    Attributes:
        task: the task's name.
        index: from which the task made it.
        messages: the prompt, chat messages in OpenAI's shape.
        answer: a right reply, in the form that is asked for; empty where none is known.
        data: what scoring needs besides.
    """

    task: str
    index: int
    messages: tuple[Mapping[str, Any], ...]
    answer: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Score:
    """What a reply is worth, each in 0 to 1.

    Attributes:
        strict: what training rewards: right, and in the form that was asked for.
        lenient: right, in whatever form it can be found in the reply.
    """

    strict: float
    lenient: float


class Task(Protocol):
    """Makes problems and scores replies; the same for the same arguments, in any process."""

    name: str

    def problem(self, index: int) -> Problem:
        """The problem of an index; from `HELD_OUT` on those that no stage trains on."""

    def score(self, problem: Problem, reply: str) -> Score:
        """What a reply to a problem of this task is worth. Never raises for what a model may write."""
