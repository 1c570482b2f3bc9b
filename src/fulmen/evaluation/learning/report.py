"""A run of reinforcement learning as a report: what was learned, and whether it can be trusted."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from typing import Any

from fulmen.evaluation.html import html_facts, html_figure, html_page, html_table
from fulmen.evaluation.learning.plots import learning_plots
from fulmen.evaluation.statistics import (
    Interval,
    interval_row,
    mean_interval,
    paired_difference_interval,
    wilson_interval,
)
from fulmen.evaluation.wording import markdown_facts, markdown_table, points_text, shares_text

KINDS = ("strict", "lenient")


@dataclass(frozen=True)
class LearningReport:
    """What a run came to.

    Attributes:
        rows: lines of its log, one a step.
        held_out: by task and kind of score: intervals "before", "after" and "change", and "n"; shares.
        about: what a reader needs to repeat the run, by name.
    """

    rows: list[dict[str, Any]]
    held_out: dict[str, dict[str, Any]]
    about: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Every number, of plain JSON types."""
        return asdict(self)

    def table(self) -> list[list[str]]:
        """Scores of held-out problems before and after, the header first."""
        rows = [["task", "score", "problems", "before", "after", "change in points (95 % interval)"]]
        for task, kinds in self.held_out.items():
            for kind, found in kinds.items():
                rows.append([task, kind, str(found["n"]), *_cells(found)])
        return rows

    def verdict(self) -> str:
        """One sentence on the held-out problems."""
        if not self.held_out:
            return "No held-out problems were asked."
        found = [(task, kinds["strict"]["change"]) for task, kinds in self.held_out.items()]
        parts = [f"{task} {points_text(_in_points(change))} points" for task, change in found]
        return f"On held-out problems, strict score after - before: {'; '.join(parts)}."

    def notes(self) -> list[str]:
        """What else a reader should know."""
        steps, failed = len(self.rows), sum(row["failed_rewards"] for row in self.rows)
        constant, groups = (sum(row[name] for row in self.rows) for name in ("constant_groups", "groups"))
        gap = max(row["engine_trainer_gap"] for row in self.rows)
        notes = [
            f"{steps} steps. {constant} of {groups} groups had replies of one score, which teach nothing.",
            f"Engine and trainer differed by {gap:.1e} nats a token at most (mean of a step).",
        ]
        if failed:
            notes.append(f"{failed} replies could not be scored, and were left out.")
        return notes

    def to_markdown(self) -> str:
        """Findings and table."""
        table = [markdown_table(self.table())] if self.held_out else []
        parts = [self.verdict(), *table, *self.notes(), markdown_facts(self.about)]
        return "\n\n".join(parts) + "\n"

    def to_html(self) -> str:
        """One page with plots, that needs no other file."""
        title = f"Reinforcement learning of {self.about.get('model', 'a model')}"
        rows = self.table()
        scores = f'<div class="scroll">{html_table(rows, ["row"] * (len(rows) - 1))}</div>'
        body = [
            f"<h1>{escape(title)}</h1>",
            f'<p class="verdict">{escape(self.verdict())}</p>',
            *(f"<p>{escape(note)}</p>" for note in self.notes()),
            scores if self.held_out else "",
            f'<div class="figures">{"".join(map(html_figure, learning_plots(self.rows)))}</div>',
            f"<footer>{html_facts(self.about)}</footer>",
        ]
        return html_page(title, body)


def learning_report(
    rows: Sequence[Mapping[str, Any]],
    before: Mapping[str, Sequence[Sequence[float]]],
    after: Mapping[str, Sequence[Sequence[float]]],
    about: Mapping[str, str],
) -> LearningReport:
    """The report of a log and of the strict and lenient scores of the same problems before and after."""
    held_out = {
        task: {
            kind: _compared([pair[place] for pair in before[task]], [pair[place] for pair in after[task]])
            for place, kind in enumerate(KINDS)
        }
        for task in before
        if before[task]
    }
    return LearningReport([dict(row) for row in rows], held_out, dict(about))


def _compared(before: Sequence[float], after: Sequence[float]) -> dict[str, Any]:
    if {*before, *after} <= {0.0, 1.0}:
        right, was_right = [score == 1 for score in after], [score == 1 for score in before]
        change = paired_difference_interval(right, was_right)
    else:
        change = mean_interval([new - old for old, new in zip(before, after, strict=True)])
    intervals = {"before": _share(before), "after": _share(after), "change": change}
    return {"n": len(before), **{name: interval_row(interval) for name, interval in intervals.items()}}


def _share(scores: Sequence[float]) -> Interval:
    if set(scores) <= {0.0, 1.0}:
        return wilson_interval(round(sum(scores)), len(scores))
    return mean_interval(scores)


def _cells(found: Mapping[str, Any]) -> list[str]:
    shares = [f"{100 * found[when]['estimate']:.1f} % {_limits(found[when])}" for when in ("before", "after")]
    return [*shares, points_text(_in_points(found["change"]))]


def _limits(interval: Mapping[str, Any]) -> str:
    return "" if interval["low"] is None else f"({shares_text(interval)})"


def _in_points(interval: Mapping[str, Any]) -> dict[str, Any]:
    return {name: None if value is None else 100 * value for name, value in interval.items()}
