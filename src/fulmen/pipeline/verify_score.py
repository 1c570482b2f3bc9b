"""How good a verifier is: on proofs whose truth is known, by kind and by fault."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fulmen.evaluation.statistics import IntervalRow, interval_row, mean_interval, wilson_interval
from fulmen.pipeline.verify_asking import Asking, Request
from fulmen.pipeline.verify_rows import Row
from fulmen.tasks.proofs.proof import RIGHT
from fulmen.tasks.proofs.replies import (
    Assessment,
    lenient_assessment,
    strict_assessment,
    verify_messages,
)

SOUND = "sound"


@dataclass(frozen=True)
class Judged:
    """One proof and what the verifier said of it; None: nothing that could be read."""

    row: Row
    strict: Assessment | None
    lenient: Assessment | None

    @property
    def is_sound(self) -> bool:
        """Whether the proof has no fault."""
        return bool(self.row["score"] == RIGHT)

    def is_right(self, said: Assessment | None) -> bool:
        """Whether it was told to be sound or not, as it is."""
        return said is not None and (said.score == RIGHT) == self.is_sound

    def cites_the_fault(self, said: Assessment | None) -> bool:
        """Whether the step that is not right was named."""
        return said is not None and said.step is not None and said.step == self.row.get("step")

    @property
    def reward(self) -> float:
        """DeepSeekMath-V2's: format, nearness of the score, and a cited fault that is there."""
        if self.strict is None:
            return 0.0
        is_real = self.strict.score == RIGHT or self.cites_the_fault(self.strict)
        return (1 - abs(self.strict.score - float(self.row["score"]))) * is_real


@dataclass(frozen=True)
class VerifierReport:
    """What a verifier did. Shares of replies out of the asked form count as wrong but where it says lenient.

    Attributes:
        model: its name. judged: each proof with what was said.
    """

    model: str
    judged: tuple[Judged, ...]

    def to_dict(self) -> dict[str, Any]:
        """All figures, as plain data; shares with 95 % intervals, null where there is nothing to count."""
        return {
            "model": self.model,
            "all": _figures(self.judged),
            "by_kind": self._grouped("kind"),
            "by_fault": self._grouped("fault"),
        }

    def table(self) -> list[list[str]]:
        """Rows for a table, the first one its header."""
        values = self.to_dict()
        groups = [("all", values["all"]), *values["by_kind"].items(), *values["by_fault"].items()]
        return [
            ["proofs", "n", "accuracy %", "lenient", "cited step %", "form", "reward"],
            *([name, *_cells(figures)] for name, figures in groups),
        ]

    def _grouped(self, field: str) -> dict[str, Any]:
        names = sorted({_group(one, field) for one in self.judged})
        return {name: _figures([one for one in self.judged if _group(one, field) == name]) for name in names}


def score_verifier(name: str, rows: Sequence[Row], asking: Asking) -> VerifierReport:
    """Ask for an assessment of each labelled proof. Raises EndpointError as `Asking.all`."""
    requests = [Request(verify_messages(row["problem"], row["proof"])) for row in rows]
    replies = asking.all("Verify", requests)
    judged = (
        Judged(row, strict_assessment(reply), lenient_assessment(reply))
        for row, reply in zip(rows, replies, strict=True)
    )
    return VerifierReport(name, tuple(judged))


def _group(judged: Judged, field: str) -> str:
    return str(judged.row.get(field) or (SOUND if field == "fault" else "unknown"))


def _figures(judged: Sequence[Judged]) -> dict[str, Any]:
    # The step can only be right where a fault is there and was seen.
    found = [one for one in judged if not one.is_sound and one.strict and one.strict.score < RIGHT]

    def share(of: Sequence[Judged], holds: Callable[[Judged], bool]) -> IntervalRow | None:
        return interval_row(wilson_interval(sum(map(holds, of)), len(of))) if of else None

    return {
        "n": len(judged),
        "sound": sum(one.is_sound for one in judged),
        "accuracy": share(judged, lambda one: one.is_right(one.strict)),
        "accuracy_lenient": share(judged, lambda one: one.is_right(one.lenient)),
        "score_exact": share(
            judged, lambda one: one.strict is not None and one.strict.score == one.row["score"]
        ),
        "cited_step_right": share(found, lambda one: one.cites_the_fault(one.strict)),
        "in_form": share(judged, lambda one: one.strict is not None),
        "reward": interval_row(mean_interval([one.reward for one in judged])),
    }


def _cells(figures: dict[str, Any]) -> list[str]:
    """Shares in percent, two of them with their limits."""

    def share(name: str) -> str:
        return f"{100 * figures[name]['estimate']:.0f}" if figures[name] else "-"

    def with_limits(name: str) -> str:
        row = figures[name]
        return f"{share(name)} ({100 * row['low']:.0f}-{100 * row['high']:.0f})" if row else "-"

    return [
        str(figures["n"]),
        with_limits("accuracy"),
        share("accuracy_lenient"),
        with_limits("cited_step_right"),
        share("in_form"),
        f"{figures['reward']['estimate']:.2f}",
    ]
