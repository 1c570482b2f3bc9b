"""How many held-out problems a model solves: strictly, in the form that was asked for, and leniently."""

from collections.abc import Mapping, Sequence
from typing import Any

from fulmen.evaluation.statistics import interval_row, wilson_interval
from fulmen.modeling.rollouts import Sampling
from fulmen.pipeline.answers import AT_ONCE, Answerer
from fulmen.pipeline.reporter import Reporter
from fulmen.tasks.base import HELD_OUT, Problem, Task
from fulmen.tasks.split import distinct_problems

# Whether each problem was solved, strictly and leniently.
Solved = list[list[bool]]


def held_out_problems(task: Task, count: int) -> list[Problem]:
    """`count` different ones; fewer where the task does not have so many."""
    return distinct_problems(task.problem, HELD_OUT, count)


def solved_by(
    answerer: Answerer,
    task: Task,
    problems: Sequence[Problem],
    max_new_tokens: int,
    reporter: Reporter,
    what: str,
) -> Solved:
    """Whether each problem is solved by the likeliest reply; one that is worth less than 1 is not."""
    found: Solved = []
    for begin in range(0, len(problems), AT_ONCE):
        reporter.advance(begin, len(problems), what)
        asked = problems[begin : begin + AT_ONCE]
        replies = answerer.replies(task, asked, Sampling(1, max_new_tokens, top_k=1))
        for problem, (reply,) in zip(asked, replies, strict=True):
            score = task.score(problem, reply)
            found.append([score.strict >= 1, score.lenient >= 1])
    reporter.advance(len(problems), len(problems), what)
    return found


def share_rows(solved: Solved) -> dict[str, Any]:
    """Shares of solved problems with their 95 % intervals (Wilson), and how many there were."""
    kinds: Mapping[str, list[bool]] = {
        "strict": [strict for strict, _ in solved],
        "lenient": [lenient for _, lenient in solved],
    }
    shares = {
        kind: dict(interval_row(wilson_interval(sum(right), len(right)))) for kind, right in kinds.items()
    }
    return {"n": len(solved), **shares}
