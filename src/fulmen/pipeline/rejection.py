"""Rejection sampling: what a specialist writes, of which right replies are kept for others to learn.

Where it solves little, the task's own answers fill up, so that all domains have as many examples.
"""

import json
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from fulmen.errors import unwritable
from fulmen.modeling.rollouts import Sampling
from fulmen.pipeline.answers import Answerer
from fulmen.pipeline.lessons import Lesson
from fulmen.pipeline.recipe_settings import Rejection
from fulmen.pipeline.reporter import Reporter
from fulmen.tasks.base import Problem, Task, conversation
from fulmen.tasks.split import distinct_problems, text_of, text_of_messages

# Training problems from here on; reinforcement learning counts from 0.
FIRST_SAMPLED, FIRST_LEARNED = 200_000_000, 100_000_000
PROBLEMS_AT_ONCE = 16


@dataclass
class RejectionCounts:
    """What became of the samples of a task, and what they were filled up with."""

    problems: int = 0
    solved: int = 0
    samples: int = 0
    right: int = 0
    duplicates: int = 0
    contaminated: int = 0
    surplus: int = 0
    kept: int = 0
    own: int = 0
    repeated: int = 0


def own_answers(task: Task, count: int) -> list[Lesson]:
    """A task's own right answers to training problems, in the form that it asks for; none if it has none."""
    problems = distinct_problems(task.problem, FIRST_LEARNED, count)
    answered = [problem for problem in problems if problem.answer]
    return [lesson for problem in answered for lesson in lessons_of(task, problem, problem.answer)]


def lessons_of(task: Task, problem: Problem, reply: str) -> list[Lesson]:
    """A problem's prompt and a reply to it: a lesson for each turn, behind all that was said before."""
    said = [dict(message) for message in conversation(task, problem, reply)]
    places = range(len(problem.messages), len(said), 2)
    return [Lesson(said[:place], str(said[place]["content"])) for place in places]


def sample_task(
    answerer: Answerer,
    task: Task,
    settings: Rejection,
    max_new_tokens: int,
    seed: int,
    journal: Path,
    forbidden: Collection[str],
    reporter: Reporter,
) -> None:
    """Let a model reply to training problems of a task, until enough is kept, a line a problem in `journal`.

    What the journal has already is not sampled again. Raises OutputError if it cannot be written.
    """
    problems = distinct_problems(task.problem, FIRST_SAMPLED, settings.problems)
    done = {row["index"] for row in read_journal(journal)}
    for begin in range(0, len(problems), PROBLEMS_AT_ONCE):
        reporter.advance(begin, len(problems), task.name)
        if _is_enough(task, settings, journal, problems[:begin], forbidden):
            break
        asked = problems[begin : begin + PROBLEMS_AT_ONCE]
        if done >= {problem.index for problem in asked}:
            continue
        # Each call has a seed of its own, the same one after an interruption.
        sampling = Sampling(
            settings.samples, max_new_tokens, settings.temperature, seed=(seed + begin + 1) % 2**32
        )
        replies = answerer.replies(task, asked, sampling)
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
    task: Task, settings: Rejection, rows: Sequence[dict[str, Any]], forbidden: Collection[str]
) -> tuple[list[Lesson], RejectionCounts]:
    """The right replies of a journal: each text once, to no problem of a forbidden text, `keep` a problem."""
    counts, found = RejectionCounts(), list[Lesson]()
    for row in sorted(rows, key=lambda row: row["index"]):
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
        kept = different[: settings.keep]
        counts.surplus += len(different) - len(kept)
        counts.kept += len(kept)
        found += [lesson for reply in kept for lesson in lessons_of(task, problem, reply)]
    return found, counts


def filled_up(
    task: Task, kept: Sequence[Lesson], count: int, forbidden: Collection[str], counts: RejectionCounts
) -> list[Lesson]:
    """`count` lessons of a task: kept replies, then its own answers to other problems, then all again.

    What was cut off or added is counted.
    """
    used = {text_of_messages(lesson.messages) for lesson in kept}
    own = [
        lesson
        for lesson in own_answers(task, count)
        if (text := text_of_messages(lesson.messages)) not in used and text not in forbidden
    ]
    own = own[: max(0, count - len(kept))]
    found = [*kept[:count], *own]
    counts.surplus += len(kept) - len(kept[:count])
    counts.kept, counts.own = len(kept[:count]), len(own)
    counts.repeated = count - len(found) if found else 0
    return list(islice(cycle(found), count))


def counts_row(counts: RejectionCounts) -> dict[str, int]:
    """Plain numbers by name."""
    return asdict(counts)


def read_journal(journal: Path) -> list[dict[str, Any]]:
    """A journal's lines; one that was being written when a run was killed is left out."""
    return list(_lines(journal)) if journal.exists() else []


def _is_enough(
    task: Task, settings: Rejection, journal: Path, asked: Sequence[Problem], forbidden: Collection[str]
) -> bool:
    """Whether the replies to these problems have as many to keep as are asked for."""
    if settings.keep_at_least is None:
        return False
    indices = {problem.index for problem in asked}
    rows = [row for row in read_journal(journal) if row["index"] in indices]
    return kept_lessons(task, settings, rows, forbidden)[1].kept >= settings.keep_at_least


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
