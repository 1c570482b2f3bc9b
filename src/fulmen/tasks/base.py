"""What a task is."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

# Problems with indices from here on are for evaluation: no stage trains on them.
HELD_OUT = 1_000_000_000
# Between the turns of a reply: ASCII's record separator, which is in no tokenizer's ordinary texts.
TURN = "\x1e"


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


class EpisodeTask(Task, Protocol):
    """A task whose replies have several turns, joined by TURN: after each the model is told something.

    Attributes:
        turns: of a reply, at most.
    """

    turns: int

    def told(self, problem: Problem, reply: str) -> str | None:
        """What a model is told after the turns that it has written; None where the reply has ended.

        Never raises for what a model may write.
        """


def turns_of(task: Task) -> int:
    """How many turns a reply of a task may have; 1 for all but an `EpisodeTask`."""
    return getattr(task, "turns", 1)


def conversation(task: Task, problem: Problem, reply: str) -> tuple[Mapping[str, Any], ...]:
    """A problem's prompt with a reply: its turns, and between them what the model was told."""
    turns = reply.split(TURN)
    messages = [*problem.messages, {"role": "assistant", "content": turns[0]}]
    for number, turn in enumerate(turns[1:], 1):
        told = cast(EpisodeTask, task).told(problem, TURN.join(turns[:number]))
        messages += [{"role": "user", "content": told or ""}, {"role": "assistant", "content": turn}]
    return tuple(messages)
