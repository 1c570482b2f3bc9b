"""Proofs that get better by being criticised, as DeepSeekMath-V2 refines them (arXiv 2511.22570).

A pool of proofs is drawn for a problem, each is verified several times, and the best are written anew from
what their verifiers found; the best of old and new go on, until one passes all verifications or the rounds
are over. A pool of one is sequential refinement: the same proof, again and again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from fulmen.pipeline.verify_asking import Asking, Request
from fulmen.pipeline.verify_rows import Row
from fulmen.pipeline.verify_writers import Messages
from fulmen.tasks.proofs.labelled import KINDS
from fulmen.tasks.proofs.proof import RIGHT, WRONG, examined, numbered, worst
from fulmen.tasks.proofs.replies import (
    Assessment,
    lenient_steps,
    prove_messages,
    readable_assessment,
    strict_proof,
    verify_messages,
    without_thoughts,
)

# Analyses that a proof is written anew from, as the paper has it.
MOST_ANALYSES = 8


@dataclass(frozen=True)
class Candidate:
    """A proof and what verifiers said of it; those that could not be read are left out."""

    proof: str
    said: tuple[Assessment, ...] = ()

    @property
    def score(self) -> float:
        """The mean of what was said; 0 if nothing was."""
        return fmean(one.score for one in self.said) if self.said else WRONG

    @property
    def passes(self) -> bool:
        """Whether all verifications found it right."""
        return bool(self.said) and self.score == RIGHT


def refine_proofs(
    rows: Sequence[Row], prover: Asking, verifier: Asking, pool: int, verifications: int, rounds: int
) -> list[Row]:
    """The rows with the best `proof`, its `proof_score` by the verifier, and `history`: the best, by round.

    Of problems that `fulmen verify make` wrote, `machine_score` is the truth about that proof.

    Args:
        rows: with `problem`. pool: proofs of each. verifications: of each proof. rounds: at most.

    Raises EndpointError as `Asking.all`.
    """
    drawn = prover.all(
        "Prove",
        [
            Request(prove_messages(row["problem"], _form(row)), number)
            for row in rows
            for number in range(pool)
        ],
    )
    pools = [[_proof_text(text) for text in drawn[n * pool : (n + 1) * pool]] for n in range(len(rows))]
    best = _verified(rows, pools, verifier, verifications, "Verify")
    history = [[found[0].score] for found in best]
    for round_ in range(1, rounds + 1):
        open_ = [n for n, found in enumerate(best) if not found[0].passes]
        if not open_:
            break
        some = [rows[n] for n in open_]
        written = _rewritten(some, [best[n] for n in open_], prover, round_)
        new = _verified(some, written, verifier, verifications, f"Verify {round_}")
        for n, found in zip(open_, new, strict=True):
            # The newer of two alike: a pool of one goes on from it.
            best[n] = sorted([*found, *best[n]], key=lambda one: -one.score)[:pool]
            history[n].append(best[n][0].score)
    return [_result(row, found[0], scores) for row, found, scores in zip(rows, best, history, strict=True)]


def refine_messages(problem: str, form: str, candidate: Candidate) -> Messages:
    """The request to write a proof anew, from what its readers found: doubts first."""
    doubts = sorted(candidate.said, key=lambda one: one.score)[:MOST_ANALYSES]
    found = "\n\n".join(map(str, doubts)) or "None could be read."
    (asked,) = prove_messages(problem, form)
    content = (
        f"{asked['content']}\n\nHere is an earlier proof and what readers found in it. They may be wrong. "
        f"Write a better proof, in the form above.\n\nEarlier proof:\n{candidate.proof}\n\nReaders:\n{found}"
    )
    return ({"role": "user", "content": content},)


def _verified(
    rows: Sequence[Row], pools: Sequence[Sequence[str]], verifier: Asking, verifications: int, stage: str
) -> list[list[Candidate]]:
    """The proofs of each row with their verifications, best first."""
    asked = [
        Request(verify_messages(row["problem"], proof), number)
        for row, proofs in zip(rows, pools, strict=True)
        for proof in proofs
        for number in range(verifications)
    ]
    said = iter(map(readable_assessment, verifier.all(stage, asked)))
    found = [
        [
            Candidate(proof, tuple(one for _ in range(verifications) if (one := next(said)) is not None))
            for proof in proofs
        ]
        for proofs in pools
    ]
    return [sorted(candidates, key=lambda one: -one.score) for candidates in found]


def _rewritten(
    rows: Sequence[Row], pools: Sequence[Sequence[Candidate]], prover: Asking, round_: int
) -> list[list[str]]:
    asked = [
        # Another number each time: what did not help is not written again.
        Request(refine_messages(row["problem"], _form(row), candidate), round_ * len(candidates) + place)
        for row, candidates in zip(rows, pools, strict=True)
        for place, candidate in enumerate(candidates)
    ]
    texts = iter(map(_proof_text, prover.all(f"Refine {round_}", asked)))
    return [[next(texts) for _ in candidates] for candidates in pools]


def _proof_text(reply: str) -> str:
    """The proof of a reply, without the author's own assessment, which would sway a reader."""
    found = strict_proof(reply)
    if found:
        return numbered(found[0])
    text = without_thoughts(reply).partition("\nAnalysis:")[0].strip()
    return text.removeprefix("Proof:").strip() or "(empty)"


def _form(row: Row) -> str:
    kind = KINDS.get(str(row.get("kind")))
    return kind.form if kind else ""


def _result(row: Row, best: Candidate, history: list[float]) -> dict[str, Any]:
    result = {
        "problem": row["problem"],
        "proof": best.proof,
        "proof_score": best.score,
        "passes": best.passes,
        "history": history,
        "readers": [{"score": one.score, "step": one.step, "analysis": one.analysis} for one in best.said],
    }
    kind = KINDS.get(str(row.get("kind")))
    if kind:
        findings = examined(kind, row["problem"], lenient_steps(best.proof))
        result |= {"kind": kind.name, "index": row.get("index"), "machine_score": worst(findings)}
    return result
