"""What a verifier and a prover are asked to write, and what they wrote, read.

The form is strict, as it is rewarded: one analysis, one step, one score, which do not contradict each other.
The lenient reading takes the last score and step that stand anywhere.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fulmen.tasks.proofs.proof import RIGHT, SLIP, WRONG, Finding, Step, numbered, worst

ASSESSMENT_FORM = (
    "Analysis: each step in turn, what it should give, and whether it is right\n"
    "Step: the number of the first step that is not right, or none\n"
    "Score: 1, 0.5 or 0"
)
RUBRIC = (
    "A step is right if its claim follows from the problem and the steps before it, right or not, for the "
    "reason it gives. Score 1: all steps are right; 0.5: every claim follows, but a step's reason is not "
    "what gives it; 0: a claim does not follow, or the proof does not end at what is asked for."
)
_SCORES = {"1": RIGHT, "1.0": RIGHT, "0.5": SLIP, "½": SLIP, "1/2": SLIP, "0": WRONG, "0.0": WRONG}
_STRICT = re.compile(
    r"Analysis:(?P<text>.*\S.*?)\n+Step: (?P<step>none|\d{1,3})\nScore: (?P<score>1|0\.5|0)\s*", re.DOTALL
)
_REPEATED = re.compile(r"^\s*(?:Analysis|Step|Score):", re.MULTILINE)
_ANY_SCORE = re.compile(r"\bscore\b\W{0,9}(?:is|of)?\W{0,9}(1/2|[01]\.\d+|½|[01])(?![\d/])", re.IGNORECASE)
_ANY_STEP = re.compile(r"\bstep\b\W{0,6}(none|\d{1,3})\b", re.IGNORECASE)
_LINE = re.compile(r"^\s*(\d{1,3})[.)]\s+(.+):\s*(\S.*?)\s*$", re.MULTILINE)
_PROVED = re.compile(r"\s*Proof:\s*\n(?P<proof>.+?)\n+(?P<rest>Analysis:.*)", re.DOTALL)


@dataclass(frozen=True)
class Assessment:
    """What a verifier says of a proof. step: that is not right; None: all are."""

    analysis: str
    step: int | None
    score: float

    def __str__(self) -> str:
        step = "none" if self.step is None else self.step
        return f"Analysis:\n{self.analysis}\nStep: {step}\nScore: {self.score:g}"


def verify_messages(problem: str, proof: str) -> tuple[Mapping[str, Any], ...]:
    """The request to check a proof, whatever it is about."""
    asked = (
        f"Check the proof below, step by step. {RUBRIC}\n\nProblem:\n{problem}\n\nProof:\n{proof}\n\n"
        f"Answer in this form, with nothing after it:\n{ASSESSMENT_FORM}"
    )
    return ({"role": "user", "content": asked},)


def prove_messages(problem: str, form: str = "") -> tuple[Mapping[str, Any], ...]:
    """The request for a proof and an honest assessment of it. form: of steps, where that is fixed."""
    asked = (
        "Solve the problem below by a proof in numbered steps, each a reason and its claim: `reason: claim`. "
        f"{form}\n\nThen assess your proof as a strict reader would; it pays to admit a fault. {RUBRIC}\n\n"
        f"Problem:\n{problem}\n\nAnswer in this form, with nothing after it:\n"
        f"Proof:\n1. reason: claim\n2. reason: claim\n{ASSESSMENT_FORM}"
    )
    return ({"role": "user", "content": asked},)


def without_thoughts(reply: str) -> str:
    """What follows a model's thoughts."""
    return reply.rpartition("</think>")[2].strip()


def strict_assessment(reply: str) -> Assessment | None:
    """What a reply in the asked form says; None for any other, and for one that contradicts itself."""
    found = _STRICT.fullmatch(without_thoughts(reply))
    if not found or _REPEATED.search(found["text"]):
        return None
    step = None if found["step"] == "none" else int(found["step"])
    score = _SCORES[found["score"]]
    if (step is None) != (score == RIGHT):
        return None
    return Assessment(found["text"].strip(), step, score)


def lenient_assessment(reply: str) -> Assessment | None:
    """The last score and the last step of a reply; None without a score."""
    text = without_thoughts(reply)
    scores = [_SCORES[said] for said in _ANY_SCORE.findall(text) if said in _SCORES]
    steps = _ANY_STEP.findall(text)
    if not scores:
        return None
    is_named = steps and steps[-1].lower() != "none" and scores[-1] < RIGHT
    return Assessment(text, int(steps[-1]) if is_named else None, scores[-1])


def readable_assessment(reply: str) -> Assessment | None:
    """By the form, else as far as it can be read."""
    return strict_assessment(reply) or lenient_assessment(reply)


def assessment_value(said: Assessment, findings: Sequence[Finding], needs_real_fault: bool = True) -> float:
    """How near an assessment's score is to the truth; 0 if the fault that it cites is not there."""
    nearness = 1 - abs(said.score - worst(findings))
    return nearness if not needs_real_fault or is_real(said, findings) else 0.0


def is_real(said: Assessment, findings: Sequence[Finding]) -> bool:
    """Whether the step that an assessment below 1 cites is indeed not right."""
    if said.score == RIGHT:
        return True
    return said.step is not None and 0 < said.step <= len(findings) and findings[said.step - 1].score < RIGHT


def truth_of(findings: Sequence[Finding]) -> Assessment:
    """The right assessment: each step's finding, up to the first that is not right."""
    lines = []
    for number, finding in enumerate(findings, 1):
        if finding.score < RIGHT:
            lines.append(f"{number}. {finding.remark}: not right")
            return Assessment("\n".join(lines), number, worst(findings))
        lines.append(f"{number}. {finding.remark}: right")
    return Assessment("\n".join(lines), None, RIGHT)


def strict_proof(reply: str) -> tuple[list[Step], Assessment] | None:
    """Steps and assessment of a reply in the asked form; None for any other."""
    found = _PROVED.fullmatch(without_thoughts(reply))
    said = strict_assessment(found["rest"]) if found else None
    if not found or said is None:
        return None
    lines = [line for line in found["proof"].splitlines() if line.strip()]
    steps = [_LINE.fullmatch(line) for line in lines]
    if not all(step and int(step[1]) == number for number, step in enumerate(steps, 1)):
        return None
    return [Step(step[2], step[3]) for step in steps if step], said


def lenient_steps(reply: str) -> list[Step]:
    """Lines of a reply that look like steps, up to where it assesses them."""
    text = re.split(r"^\s*Analysis:", without_thoughts(reply), maxsplit=1, flags=re.MULTILINE)[0]
    return [Step(reason, claim) for _, reason, claim in _LINE.findall(text)]


def proof_reply(steps: Sequence[Step], said: Assessment) -> str:
    """A reply of `prove_messages`' form."""
    return f"Proof:\n{numbered(steps)}\n{said}"
