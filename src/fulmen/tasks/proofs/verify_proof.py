"""The task of a verifier: is this proof right, and where is its fault?

The reward is DeepSeekMath-V2's for a verifier (arXiv 2511.22570): R_format (1 - |s' - s|) R_meta. R_meta,
that the cited fault is real, is there a model's judgement; here it is looked up.
"""

from dataclasses import dataclass
from functools import lru_cache

from fulmen.tasks.base import Problem, Score
from fulmen.tasks.proofs.labelled import LabelledProof, ProofSource
from fulmen.tasks.proofs.replies import (
    assessment_value,
    lenient_assessment,
    strict_assessment,
    truth_of,
    verify_messages,
)


@dataclass
class VerifyProof:
    """Proofs to check.

    Attributes:
        source: of the proofs.
        meta: whether an assessment below 1 counts for nothing unless the step that it cites is indeed not
            right; without that a verifier may guess.
    """

    source: ProofSource
    meta: bool = True
    name: str = "verify_proof"

    def problem(self, index: int) -> Problem:
        """As `Task.problem`; the answer is the analysis of a check step by step."""
        made = _labelled(self.source, index)
        return Problem(
            self.name,
            index,
            verify_messages(made.proof.problem, made.proof.text),
            str(truth_of(made.findings)),
            {"kind": made.proof.kind, "fault": made.fault, "score": made.score, "step": made.step},
        )

    def score(self, problem: Problem, reply: str) -> Score:
        """As `Task.score`."""
        findings = _labelled(self.source, problem.index).findings
        strict, lenient = strict_assessment(reply), lenient_assessment(reply)
        return Score(
            strict=assessment_value(strict, findings, self.meta) if strict else 0.0,
            lenient=assessment_value(lenient, findings, self.meta) if lenient else 0.0,
        )


@lru_cache(maxsize=1024)
def _labelled(source: ProofSource, index: int) -> LabelledProof:
    """A group of replies asks for the same one again."""
    return source.labelled(index)
