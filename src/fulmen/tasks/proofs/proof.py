"""A proof, what is found in it, and what a kind of proofs is.

A step is a claim with its reason. It is RIGHT if the claim follows from the problem and the steps before it,
whatever these are, for that reason; a SLIP if it follows in one step, but for another reason; else WRONG. So
one wrong step leaves those behind it right. A proof's score is that of its worst step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Protocol

WRONG, SLIP, RIGHT = 0.0, 0.5, 1.0
SCORES = (WRONG, SLIP, RIGHT)
# The fault of every kind that makes a slip.
REASON = "reason"


@dataclass(frozen=True)
class Step:
    """One line of a proof, which is written `reason: claim`."""

    reason: str
    claim: str

    def __str__(self) -> str:
        return f"{self.reason}: {self.claim}"


@dataclass(frozen=True)
class Proof:
    """Steps that shall solve a problem. kind: of `KINDS`; problem: all that is given and asked for."""

    kind: str
    problem: str
    steps: tuple[Step, ...]

    @property
    def text(self) -> str:
        """Its lines, numbered from 1."""
        return numbered(self.steps)


@dataclass(frozen=True)
class Finding:
    """What a check says of one step. score: RIGHT, SLIP or WRONG; remark: why, for a reader."""

    score: float
    remark: str


class ProofKind(Protocol):
    """Problems of one kind, and how their proofs are checked.

    Attributes:
        name: of the kind.
        faults: names of all that make a step WRONG.
        shortest, longest: steps of the proofs that it can draw.
        form: how its steps are written, for whoever is to write some.
    """

    name: str
    faults: tuple[str, ...]
    shortest: int
    longest: int
    form: str

    def faults_of(self, n_steps: int) -> tuple[str, ...]:
        """Those of `faults` that proofs of a length can have."""

    def draw(self, random: Random, n_steps: int, fault: str | None) -> Proof | None:
        """A proof of `n_steps`, with one fault (of `faults`, or REASON) somewhere; None: that try failed."""

    def check(self, problem: str, steps: Sequence[Step]) -> list[Finding]:
        """A finding for each step, whoever wrote it. Never raises for what a model may write."""

    def is_finished(self, problem: str, steps: Sequence[Step]) -> bool:
        """Whether the last step says what the problem asks for."""


def numbered(steps: Sequence[Step]) -> str:
    """Steps as lines that begin with their numbers."""
    return "\n".join(f"{number}. {step}" for number, step in enumerate(steps, 1))


def examined(kind: ProofKind, problem: str, steps: Sequence[Step]) -> list[Finding]:
    """A finding for each step; a last one that does not say what the problem asks for is WRONG."""
    findings = kind.check(problem, steps)
    if findings and not kind.is_finished(problem, steps):
        findings[-1] = Finding(WRONG, "this is not yet what the problem asks for")
    return findings


def worst(findings: Sequence[Finding]) -> float:
    """The score of a proof; one without steps is WRONG."""
    return min((finding.score for finding in findings), default=WRONG)
