"""The task of a prover that assesses itself: solve the problem, and say honestly what is wrong with that.

The reward is DeepSeekMath-V2's for a generator (arXiv 2511.22570): R_format (0.76 R_Y + 0.24 R_Z), of the
proof Y and its assessment Z: R_Y is the proof's score, here by a check of each step, R_Z as for a verifier.
"""

from dataclasses import dataclass

from fulmen.tasks.base import Problem, Score
from fulmen.tasks.proofs.labelled import KINDS, ProofSource
from fulmen.tasks.proofs.proof import Step, examined, worst
from fulmen.tasks.proofs.replies import (
    Assessment,
    assessment_value,
    lenient_assessment,
    lenient_steps,
    proof_reply,
    prove_messages,
    strict_proof,
    truth_of,
)

PROOF_SHARE, ASSESSMENT_SHARE = 0.76, 0.24


@dataclass
class Prove:
    """Problems to solve by a proof, with an assessment of it. source: of the problems."""

    source: ProofSource
    name: str = "prove"

    def problem(self, index: int) -> Problem:
        """As `Task.problem`."""
        made = self.source.sound(index)
        kind, problem = made.proof.kind, made.proof.problem
        answer = proof_reply(made.proof.steps, truth_of(made.findings))
        messages = prove_messages(problem, KINDS[kind].form)
        return Problem(self.name, index, messages, answer, {"kind": kind, "problem": problem})

    def score(self, problem: Problem, reply: str) -> Score:
        """As `Task.score`."""
        strict = strict_proof(reply)
        return Score(
            strict=_value(problem, *strict) if strict else 0.0,
            lenient=_value(problem, lenient_steps(reply), lenient_assessment(reply)),
        )


def _value(problem: Problem, steps: list[Step], said: Assessment | None) -> float:
    if not steps:
        return 0.0
    findings = examined(KINDS[problem.data["kind"]], problem.data["problem"], steps)
    assessed = assessment_value(said, findings) if said else 0.0
    return PROOF_SHARE * worst(findings) + ASSESSMENT_SHARE * assessed
