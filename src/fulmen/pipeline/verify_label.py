"""Labels for proofs without people, as DeepSeekMath-V2 makes them (arXiv 2511.22570).

A verifier writes n analyses of a proof. Each that finds a fault (a score below 1) is itself judged m times:
is what it cites there, and does it justify the score? An analysis that most of its votes uphold counts. The
label is the lowest score that k counting analyses give; 1 if none counts; else it stays open.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from re import IGNORECASE, MULTILINE, findall
from typing import Any

from fulmen.pipeline.verify_asking import Asking, Request
from fulmen.pipeline.verify_rows import Row
from fulmen.pipeline.verify_writers import Messages
from fulmen.tasks.proofs.proof import RIGHT, SCORES
from fulmen.tasks.proofs.replies import (
    RUBRIC,
    Assessment,
    readable_assessment,
    verify_messages,
    without_thoughts,
)


@dataclass(frozen=True)
class VotedAnalysis:
    """An analysis and what was said of it. upheld: votes for it; votes: that could be read."""

    said: Assessment
    upheld: int = 0
    votes: int = 0

    @property
    def counts(self) -> bool:
        """Whether most of its votes uphold it."""
        return 2 * self.upheld > self.votes

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        said = self.said
        return {
            "score": said.score,
            "step": said.step,
            "analysis": said.analysis,
            "upheld": self.upheld,
            "votes": self.votes,
        }


def label_proofs(rows: Sequence[Row], asking: Asking, analyses: int, votes: int, uphold: int) -> list[Row]:
    """The rows with `label` (1, 0.5, 0, or null: open), `analyses`, and how many could not be read.

    Args:
        analyses: of each proof. votes: on each analysis that finds a fault. uphold: counting analyses that a
            label below 1 takes.

    Raises EndpointError as `Asking.all`.
    """
    asked = [
        Request(verify_messages(row["problem"], row["proof"]), number)
        for row in rows
        for number in range(analyses)
    ]
    replies = [readable_assessment(reply) for reply in asking.all("Analyse", asked)]
    said = [replies[place * analyses : (place + 1) * analyses] for place in range(len(rows))]
    voted = _voted(rows, said, asking, votes)
    return [
        row
        | {
            "label": label_of(found, uphold),
            "analyses": [one.to_dict() for one in found],
            "unreadable": analyses - len(found),
        }
        for row, found in zip(rows, voted, strict=True)
    ]


def label_of(analyses: Sequence[VotedAnalysis], uphold: int) -> float | None:
    """The lowest score that `uphold` counting analyses give; 1 if none below counts; None: open."""
    counting = [one.said.score for one in analyses if one.said.score < RIGHT and one.counts]
    for score in SCORES[:-1]:
        if counting.count(score) >= uphold:
            return score
    return RIGHT if analyses and not counting else None


def meta_messages(problem: str, proof: str, said: Assessment) -> Messages:
    """The request to judge an analysis."""
    asked = (
        "Below are a problem, a proof of it, and a reader's analysis of the proof. Judge the analysis: is "
        f"the fault that it cites really there, and does it justify the score? {RUBRIC}\n\n"
        f"Problem:\n{problem}\n\nProof:\n{proof}\n\n{said}\n\n"
        "Answer in this form, with nothing after it:\nReasons: what you checked\nVerdict: upheld or refuted"
    )
    return ({"role": "user", "content": asked},)


def verdict_of(reply: str) -> bool | None:
    """Whether a judge upholds; None where it does not say, or says both."""
    said = {
        word.lower()
        for word in findall(
            r"^\W*Verdict\W+(upheld|refuted)\W*$", without_thoughts(reply), IGNORECASE | MULTILINE
        )
    }
    return said == {"upheld"} if len(said) == 1 else None


def _voted(
    rows: Sequence[Row], said: Sequence[Sequence[Assessment | None]], asking: Asking, votes: int
) -> list[list[VotedAnalysis]]:
    read = [[one for one in analyses if one is not None] for analyses in said]
    doubts = [
        (row, one) for row, analyses in zip(rows, read, strict=True) for one in analyses if one.score < RIGHT
    ]
    asked = [
        Request(meta_messages(row["problem"], row["proof"], one), number)
        for row, one in doubts
        for number in range(votes)
    ]
    verdicts = [verdict_of(reply) for reply in asking.all("Vote", asked)]
    parts = iter(verdicts[place * votes : (place + 1) * votes] for place in range(len(doubts)))
    return [[_counted(one, parts) for one in analyses] for analyses in read]


def _counted(said: Assessment, parts: Any) -> VotedAnalysis:
    if said.score == RIGHT:
        return VotedAnalysis(said)
    verdicts = [one for one in next(parts) if one is not None]
    return VotedAnalysis(said, sum(verdicts), len(verdicts))
