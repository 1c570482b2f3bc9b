"""Proofs by index, with what is wrong in them: half are sound, half have one fault.

Of ten neighbouring proofs of a kind five are sound (score 1), four have a wrong step (0), one a step that
follows, but not for its reason (0.5). Held-out problems and those for training have no text in common: the
hash of a problem's text says to which of the two it belongs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from random import Random

from fulmen.tasks.base import HELD_OUT
from fulmen.tasks.proofs.equations import Equations
from fulmen.tasks.proofs.logic import Logic
from fulmen.tasks.proofs.proof import REASON, RIGHT, SLIP, WRONG, Finding, Proof, ProofKind, examined, worst
from fulmen.tasks.proofs.words import Words

KINDS: dict[str, ProofKind] = {kind.name: kind for kind in (Equations(), Logic(), Words())}
ROUND, SLIP_IN_ROUND = 10, 9
# One problem in so many is held out.
HELD_OUT_SHARE = 8
# Far more than any takes.
MOST_ATTEMPTS = 20_000


@dataclass(frozen=True)
class LabelledProof:
    """A proof and the truth about it.

    Attributes:
        findings: of each step. fault: its name, None in a sound proof.
    """

    proof: Proof
    findings: tuple[Finding, ...]
    fault: str | None

    @property
    def score(self) -> float:
        """1, 0.5 or 0."""
        return worst(self.findings)

    @property
    def step(self) -> int | None:
        """The number of the step that is not right; None in a sound proof."""
        bad = (number for number, finding in enumerate(self.findings, 1) if finding.score < RIGHT)
        return next(bad, None)


@dataclass(frozen=True)
class ProofSource:
    """Which proofs there are. kinds: in turn; shortest, longest: of their proofs, in steps."""

    kinds: tuple[ProofKind, ...]
    shortest: int
    longest: int

    def labelled(self, index: int) -> LabelledProof:
        """The proof of an index, sound or with one fault."""
        kind = self._kind(index)
        place = index // len(self.kinds) % ROUND
        return self._drawn(kind, index, lambda faults, random: _fault(place, faults, random))

    def sound(self, index: int) -> LabelledProof:
        """The sound proof of an index."""
        return self._drawn(self._kind(index), index, lambda faults, random: None)

    def _kind(self, index: int) -> ProofKind:
        return self.kinds[index % len(self.kinds)]

    def _drawn(
        self, kind: ProofKind, index: int, choose_fault: Callable[[Sequence[str], Random], str | None]
    ) -> LabelledProof:
        """The first that fits: length and fault are chosen before, so that no choice favours either."""
        chosen = Random(f"{kind.name} {index}")
        n_steps = chosen.randint(self.shortest, self.longest)
        fault = choose_fault(kind.faults_of(n_steps), chosen)
        for attempt in range(MOST_ATTEMPTS):
            proof = kind.draw(Random(f"{kind.name} {index} {attempt}"), n_steps, fault)
            if proof is None or is_held_out(proof.problem) != (index >= HELD_OUT):
                continue
            findings = examined(kind, proof.problem, proof.steps)
            if [finding.score for finding in findings if finding.score < RIGHT] == _expected(fault):
                return LabelledProof(proof, tuple(findings), fault)
        raise AssertionError((kind.name, index, n_steps, fault))


def is_held_out(problem: str) -> bool:
    """Whether a problem is for evaluation, by its text."""
    return sha256(problem.encode()).digest()[0] % HELD_OUT_SHARE == 0


def _fault(place: int, faults: Sequence[str], random: Random) -> str | None:
    if place % 2 == 0:
        return None
    return REASON if place == SLIP_IN_ROUND else random.choice(faults)


def _expected(fault: str | None) -> Sequence[float]:
    """Scores of the steps that are not right."""
    if fault is None:
        return []
    return [SLIP if fault == REASON else WRONG]
