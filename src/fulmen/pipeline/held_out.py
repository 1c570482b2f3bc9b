"""What a model solves of held-out problems: by likeliest replies, strictly and leniently, and by samples."""

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

from fulmen.modeling.rollouts import Sampling
from fulmen.pipeline.answers import AT_ONCE, Answerer
from fulmen.pipeline.reporter import Reporter
from fulmen.tasks.base import HELD_OUT, Problem, Task
from fulmen.tasks.split import distinct_problems

# Of each problem: whether the likeliest reply solves it, strictly and leniently (0 or 1), and which share of
# sampled replies does, strictly.
Solved = list[list[float]]
# Samples are drawn as reinforcement learning draws them.
SAMPLED = {"temperature": 1.0, "top_p": 0.95, "top_k": 64}


def held_out_problems(task: Task, count: int) -> list[Problem]:
    """`count` different ones; fewer where the task does not have so many."""
    return distinct_problems(task.problem, HELD_OUT, count)


def solved_by(
    answerer: Answerer,
    task: Task,
    problems: Sequence[Problem],
    max_new_tokens: int,
    samples: int,
    reporter: Reporter,
    what: str,
) -> Solved:
    """What of each problem is solved; by a reply that is worth less than 1 it is not.

    samples: replies to each problem beside the likeliest one.
    """
    replies: list[list[list[str]]] = []
    done, total = 0, len(problems) * (1 + samples)
    for sampling in (
        Sampling(1, max_new_tokens, top_k=1),
        Sampling(samples, max_new_tokens, **SAMPLED),  # type: ignore[arg-type]
    ):
        replies.append([])
        for begin in range(0, len(problems), each := max(1, AT_ONCE // sampling.per_prompt)):
            reporter.advance(done, total, what)
            asked = problems[begin : begin + each]
            replies[-1] += answerer.replies(task, asked, replace(sampling, seed=begin))
            done += len(asked) * sampling.per_prompt
    reporter.advance(total, total, what)
    return [
        _scores(task, problem, likeliest, sampled)
        for problem, (likeliest,), sampled in zip(problems, *replies, strict=True)
    ]


def _scores(task: Task, problem: Problem, likeliest: str, sampled: Sequence[str]) -> list[float]:
    score = task.score(problem, likeliest)
    shares = [task.score(problem, reply).strict >= 1 for reply in sampled]
    return [float(score.strict >= 1), float(score.lenient >= 1), fmean(shares)]
