"""Rejection sampling: what a specialist writes, of which right replies are kept for others to learn."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fulmen.errors import unwritable
from fulmen.modeling.rollouts import Sampling
from fulmen.pipeline.answers import Answerer
from fulmen.pipeline.lessons import Lesson
from fulmen.pipeline.recipe_settings import Rejection
from fulmen.pipeline.reporter import Reporter
from fulmen.tasks.base import Problem, Task
from fulmen.tasks.split import distinct_problems, text_of

# Training problems from here on; reinforcement learning counts from 0.
FIRST_SAMPLED, FIRST_LEARNED = 200_000_000, 100_000_000
PROBLEMS_AT_ONCE = 16


@dataclass
class RejectionCounts:
    """What became of the samples of a task."""

    problems: int = 0
    solved: int = 0
    samples: int = 0
    right: int = 0
    duplicates: int = 0
    contaminated: int = 0
    surplus: int = 0
    kept: int = 0


def own_answers(task: Task, count: int) -> list[Lesson]:
    """A task's own right answers to training problems, in the form that it asks for; none if it has none."""
    problems = distinct_problems(task.problem, FIRST_LEARNED, count)
    return [lesson_of(problem, problem.answer) for problem in problems if problem.answer]


def lesson_of(problem: Problem, reply: str) -> Lesson:
    """A problem's prompt, and a reply to it."""
    return Lesson([dict(message) for message in problem.messages], reply)


def sample_task(
    answerer: Answerer,
    task: Task,
    settings: Rejection,
    max_new_tokens: int,
    seed: int,
    journal: Path,
    reporter: Reporter,
) -> None:
    """Let a model reply to training problems of a task, and write a line a problem into `journal`.

    What the journal has already is not sampled again. Raises OutputError if it cannot be written.
    """
    problems = distinct_problems(task.problem, FIRST_SAMPLED, settings.problems)
    done = {row["index"] for row in read_journal(journal)}
    for begin in range(0, len(problems), PROBLEMS_AT_ONCE):
        reporter.advance(begin, len(problems), task.name)
        asked = problems[begin : begin + PROBLEMS_AT_ONCE]
        if done >= {problem.index for problem in asked}:
            continue
        # Each call has a seed of its own, the same one after an interruption.
        sampling = Sampling(
            settings.samples, max_new_tokens, settings.temperature, seed=(seed + begin + 1) % 2**32
        )
        replies = answerer.replies(asked, sampling)
        rows = [
            {
                "index": problem.index,
                "replies": some,
                "right": [_is_right(task, problem, one) for one in some],
            }
            for problem, some in zip(asked, replies, strict=True)
            if problem.index not in done
        ]
        _append(journal, rows)
    reporter.advance(len(problems), len(problems), task.name)


def kept_lessons(
    task: Task, settings: Rejection, journal: Path, held_out: Sequence[Problem]
) -> tuple[list[Lesson], RejectionCounts]:
    """The right replies of a journal: each text once, none to a held-out problem, `keep` a problem."""
    forbidden, counts = {text_of(problem) for problem in held_out}, RejectionCounts()
    found: list[Lesson] = []
    for row in sorted(read_journal(journal), key=lambda row: row["index"]):
        problem = task.problem(row["index"])
        right = [reply for reply, is_right in zip(row["replies"], row["right"], strict=True) if is_right]
        different = [reply for reply, _ in Counter(reply.strip() for reply in right).most_common()]
        counts.problems += 1
        counts.solved += bool(right)
        counts.samples += len(row["replies"])
        counts.right += len(right)
        counts.duplicates += len(right) - len(different)
        if text_of(problem) in forbidden:
            counts.contaminated += len(different)
            continue
        counts.surplus += max(0, len(different) - settings.keep)
        found += [lesson_of(problem, reply) for reply in different[: settings.keep]]
    counts.kept = len(found)
    return found, counts


def counts_row(counts: RejectionCounts) -> dict[str, int]:
    """Plain numbers by name."""
    return asdict(counts)


def read_journal(journal: Path) -> list[dict[str, Any]]:
    """A journal's lines; one that was being written when a run was killed is left out."""
    return list(_lines(journal)) if journal.exists() else []


def _lines(journal: Path) -> Iterator[dict[str, Any]]:
    seen: set[int] = set()
    for line in journal.read_text(encoding="utf-8").splitlines():
        try:
            row: dict[str, Any] = json.loads(line)
        except ValueError:
            continue
        if row["index"] not in seen:
            seen.add(row["index"])
            yield row


def _append(journal: Path, rows: Sequence[dict[str, Any]]) -> None:
    try:
        with open(journal, "a", encoding="utf-8") as file:
            # What was torn by a kill ends here.
            file.write("".join(f"\n{json.dumps(row)}" for row in rows) + "\n")
    except OSError as error:
        raise unwritable(journal, error) from error


def _is_right(task: Task, problem: Problem, reply: str) -> bool:
    return task.score(problem, reply).strict >= 1
