"""A recipe's run as a report: held-out problems that each stage's model solves, and every curve."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from typing import Any

from fulmen.evaluation.html import html_facts, html_figure, html_page, html_table
from fulmen.evaluation.recipe.plots import recipe_plots
from fulmen.evaluation.statistics import (
    Interval,
    interval_row,
    mean_interval,
    paired_difference_interval,
    wilson_interval,
)
from fulmen.evaluation.wording import markdown_facts, markdown_table, points_text, shares_text

# Of the likeliest reply, in the form that was asked for and in any; of sampled replies, in that form.
KINDS = ("strict", "lenient", "sampled")
# Stages by their places in the run; a specialist's are DOMAIN/cold and DOMAIN/rl.
COLD, SPECIALIST = "cold", "rl"
BASE, DISTILLED, MIXED, DENSE_MIXED = "base", "distilled", "mixed", "dense-mixed"


@dataclass(frozen=True)
class RecipeReport:
    """What a recipe's run came to, as far as it is done.

    Attributes:
        solved: by stage and domain: for each held-out problem what of each of KINDS solved it, from 0 to 1.
        samples: by task, counts of rejection sampling.
        curves: by stage, lines of its log.
        pages: by stage, where its own page or card is, from this one.
        about: what a reader needs to repeat the run, by name.
    """

    solved: Mapping[str, Mapping[str, Sequence[Sequence[float]]]]
    samples: Mapping[str, Mapping[str, int]]
    curves: Mapping[str, Sequence[Mapping[str, Any]]]
    pages: Mapping[str, str]
    about: Mapping[str, str] = field(default_factory=dict)

    @property
    def domains(self) -> list[str]:
        """In the recipe's order."""
        return list(dict.fromkeys(name for found in self.solved.values() for name in found))

    def to_dict(self) -> dict[str, Any]:
        """Every number, of plain JSON types."""
        return {**asdict(self), "shares": self.shares(), "differences": self.differences()}

    def shares(self) -> dict[str, Any]:
        """By stage, domain and kind of score: the share of problems that are solved, with its interval."""
        return {
            stage: {
                name: {"n": len(some), **{kind: _share(some, kind) for kind in KINDS}}
                for name, some in found.items()
            }
            for stage, found in self.solved.items()
        }

    def differences(self) -> list[dict[str, Any]]:
        """Pairs of stages that tell whether the recipe worked, by domain, with paired intervals in points."""
        pairs = [(f"{name}/{SPECIALIST}", f"{name}/{COLD}", name) for name in self.domains]
        pairs += [(DISTILLED, f"{name}/{SPECIALIST}", name) for name in self.domains]
        pairs += [(MIXED, DISTILLED, name) for name in self.domains]
        pairs += [(MIXED, DENSE_MIXED, name) for name in self.domains]
        return [
            {"stage": stage, "against": other, "domain": name, **self._difference(stage, other, name)}
            for stage, other, name in pairs
            if name in self.solved.get(stage, {}) and name in self.solved.get(other, {})
        ]

    def table(self) -> list[list[str]]:
        """A row a stage, three columns a domain, the header first; "-" where a stage was not asked."""
        header = ["stage", *(f"{name}, {kind}" for name in self.domains for kind in KINDS)]
        rows = [
            [stage, *(_cell(found.get(name), kind) for name in self.domains for kind in KINDS)]
            for stage, found in self.shares().items()
        ]
        return [header, *rows]

    def difference_table(self) -> list[list[str]]:
        """The pairs of `differences`."""
        rows = [
            [
                *(f"{one['stage']} - {one['against']}", one["domain"], str(one["n"])),
                *(points_text(one[kind]) for kind in KINDS),
            ]
            for one in self.differences()
        ]
        return [["difference", "domain", "problems", *(f"{kind}, points" for kind in KINDS)], *rows]

    def sample_table(self) -> list[list[str]]:
        """Counts of rejection sampling by task."""
        names = list(dict.fromkeys(name for counts in self.samples.values() for name in counts))
        rows = [[task, *(str(counts[name]) for name in names)] for task, counts in self.samples.items()]
        return [["task", *names], *rows]

    def verdict(self) -> str:
        """One sentence on the last model that answered all domains."""
        whole = [stage for stage, found in self.solved.items() if set(found) == set(self.domains)]
        last = next((stage for stage in (MIXED, DISTILLED, BASE) if stage in whole), None)
        if last is None:
            return "Nothing is measured yet."
        shares = self.shares()
        parts = [f"{name} {100 * shares[last][name]['strict']['estimate']:.0f} %" for name in self.domains]
        return f"Held-out problems that the model of stage {last} solves: {', '.join(parts)}."

    def to_markdown(self) -> str:
        """Findings and tables."""
        tables = [markdown_table(rows) for rows in self._tables()]
        links = markdown_facts({stage: f"[{page}]({page})" for stage, page in self.pages.items()})
        return "\n\n".join([self.verdict(), *tables, links, markdown_facts(self.about)]) + "\n"

    def to_html(self) -> str:
        """One page with every curve."""
        tables = (f'<div class="scroll">{html_table(rows, _names(rows))}</div>' for rows in self._tables())
        links = (
            f'<li><a href="{escape(page, quote=True)}">{escape(stage)}</a></li>'
            for stage, page in self.pages.items()
        )
        plots = recipe_plots(self.shares(), self.curves)
        body = [
            "<h1>Specialists, distillation, mixed reinforcement learning</h1>",
            f'<p class="verdict">{escape(self.verdict())}</p>',
            "<p>Shares of held-out problems that are solved, with 95 % intervals: strictly, by the likeliest "
            "reply in the form that was asked for; leniently, by that reply in any form (Wilson); sampled, "
            "by replies at temperature 1, as reinforcement learning draws them (Student, over problems).</p>",
            *tables,
            f"<p>Each stage:</p><ul>{''.join(links)}</ul>",
            f'<div class="figures">{"".join(map(html_figure, plots))}</div>',
            f"<footer>{html_facts(self.about)}</footer>",
        ]
        return html_page("A recipe of post-training", body)

    def _tables(self) -> list[list[list[str]]]:
        tables = (self.table(), self.difference_table(), self.sample_table())
        return [rows for rows in tables if len(rows) > 1]

    def _difference(self, stage: str, other: str, name: str) -> dict[str, Any]:
        new, old = self.solved[stage][name], self.solved[other][name]
        found: dict[str, Any] = {"n": len(new)}
        for place, kind in enumerate(KINDS):
            interval = _difference([one[place] for one in new], [one[place] for one in old], kind)
            row = interval_row(interval).items()
            found[kind] = {key: None if value is None else 100 * value for key, value in row}  # type: ignore[operator]
        return found


def _share(solved: Sequence[Sequence[float]], kind: str) -> dict[str, Any]:
    values = [one[KINDS.index(kind)] for one in solved]
    # Where every problem has 0 or 1, Student's interval has no width.
    if kind == "sampled" and set(values) not in ({0}, {1}):
        return dict(interval_row(_within(mean_interval(values), 0, 1)))
    return dict(interval_row(wilson_interval(round(sum(values)), len(values))))


def _difference(new: Sequence[float], old: Sequence[float], kind: str) -> Interval:
    if kind == "sampled":
        return _within(mean_interval([one - other for one, other in zip(new, old, strict=True)]), -1, 1)
    return paired_difference_interval([bool(one) for one in new], [bool(one) for one in old])


def _within(interval: Interval, lowest: float, highest: float) -> Interval:
    """Its limits where shares can be; a mean of one value has none of its own."""
    return Interval(interval.estimate, max(interval.low, lowest), min(interval.high, highest))


def _cell(found: Mapping[str, Any] | None, kind: str) -> str:
    if found is None:
        return "-"
    return f"{100 * found[kind]['estimate']:.1f} % ({shares_text(found[kind])})"


def _names(rows: Sequence[Sequence[str]]) -> list[str]:
    return ["dsa" if row[0] == MIXED else "row" for row in rows[1:]]
