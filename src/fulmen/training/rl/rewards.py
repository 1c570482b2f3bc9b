"""Scores of replies: what a task says, and what is wrong with what it says."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from fulmen.errors import EndpointError, first_line
from fulmen.tasks.base import Problem, Score, Task
from fulmen.tasks.rewards import TookTooLongError, time_limit

# For scoring one reply.
SECONDS = 60.0
# After so many steps a task that was never, or always, solved is spoken of.
UNLEARNABLE_AFTER = 10


class ScoredReply(NamedTuple):
    """One reply: its task, strict and lenient score (None: scoring failed), tokens, whether it ended."""

    task: str
    strict: float | None
    lenient: float | None
    length: int
    ended: bool


class Scorer:
    """Scores replies by their tasks; one whose scoring fails has no score.

    Args:
        tasks: by name.
        note: told of what fails, once a task.
    """

    def __init__(self, tasks: Mapping[str, Task], note: Callable[[str], None]) -> None:
        self.tasks, self._note = tasks, note
        self._told: set[str] = set()

    def score(self, problem: Problem, reply: str) -> Score | None:
        """As `Task.score`; None where it raises, hangs or returns what is no finite number.

        Raises EndpointError for a judge that is down: a run resumes from that.
        """
        try:
            with time_limit(SECONDS):
                score = self.tasks[problem.task].score(problem, reply)
            if math.isfinite(score.strict) and math.isfinite(score.lenient):
                return score
            reason = f"returned {score.strict}"
        except EndpointError:
            raise
        except (Exception, SystemExit, TookTooLongError) as error:
            reason = f"raised {type(error).__name__}: {first_line(error)}"
        if problem.task not in self._told:
            self._told.add(problem.task)
            self._note(
                f"Task {problem.task}: scoring problem {problem.index} {reason}; such replies are left out, "
                "and counted as failed_rewards"
            )
        return None


def figures_of(replies: Sequence[ScoredReply], group: int) -> dict[str, Any]:
    """What a step's replies came to, for its line in the log; groups are consecutive."""
    found = _figures(replies, group)
    names = dict.fromkeys(reply.task for reply in replies)
    found["by_task"] = {
        name: _figures([reply for reply in replies if reply.task == name], group) for name in names
    }
    return found


def unlearnable(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Of the tasks in the first steps' lines, those that were never or always solved, and what to do."""
    by_task: dict[str, list[float]] = {}
    for row in rows[:UNLEARNABLE_AFTER]:
        for name, found in row["by_task"].items():
            if found["reward"] is not None:
                by_task.setdefault(name, []).append(found["reward"])
    advice = {0.0: "no reply was right; make its problems easier, or train on right replies first"}
    advice[1.0] = "every reply was right; make its problems harder, or leave it out"
    return {
        name: advice[rewards[0]]
        for name, rewards in by_task.items()
        if rewards[0] in advice and set(rewards) == {rewards[0]}
    }


def _figures(replies: Sequence[ScoredReply], group: int) -> dict[str, Any]:
    scored = [reply for reply in replies if reply.strict is not None]
    return {
        "reward": _mean([reply.strict for reply in scored]),
        "reward_lenient": _mean([reply.lenient for reply in scored]),
        "length": _mean([reply.length for reply in replies]),
        "ended": _mean([reply.ended for reply in replies]),
        "constant_groups": sum(_is_constant(replies[n : n + group]) for n in range(0, len(replies), group)),
        "groups": len(replies) // group,
        "failed_rewards": len(replies) - len(scored),
    }


def _mean(values: Sequence[Any]) -> float | None:
    return statistics.fmean(values) if values else None


def _is_constant(group: Sequence[ScoredReply]) -> bool:
    return len({reply.strict for reply in group if reply.strict is not None}) <= 1
