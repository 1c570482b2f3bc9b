"""A parity measurement as a report: JSON, Markdown, one HTML page. Nothing is printed or written here."""

from fulmen.evaluation.parity.findings import (
    coarse_verdict,
    lookup_verdict,
    needle_verdict,
    short_summary,
    source_verdict,
    verdict,
)
from fulmen.evaluation.parity.page import candidate_rows, lookup_rows, parity_page
from fulmen.evaluation.parity.results import ParityResults
from fulmen.evaluation.wording import (
    interval_text,
    markdown_facts,
    markdown_table,
    points_text,
    signed_percent,
)


class ParityReport(ParityResults):
    """What `fulmen.evaluate` found, and how it reads."""

    def verdict(self) -> str:
        """The headline in plain words."""
        return verdict(self)

    def findings(self) -> list[str]:
        """The headline, retrieval, the coarse level, and the comparison with the model before conversion,
        where measured.
        """
        found = (lookup_verdict(self), needle_verdict(self), coarse_verdict(self), source_verdict(self))
        return [verdict(self), *(text for text in found if text)]

    def summary(self) -> list[tuple[str, ...]]:
        """Rows of a table for people, the header first: a row a variant."""
        return short_summary(self)

    def to_markdown(self) -> str:
        """Findings, the main table, and tables of kinds, budgets and needles; for a model card."""
        parts = ["## Parity with dense attention", *self.findings(), markdown_table(self.summary())]
        parts += ["By kind of text (DSA):", markdown_table(_kind_rows(self))]
        if self.sweep:
            parts += ["Loss over dense by budget k:", markdown_table(_sweep_rows(self))]
        if self.lookups:
            parts += ["Answers written:", markdown_table(lookup_rows(self.lookups))]
        if self.needles["differences"]:
            parts += ["Needles answered:", markdown_table(_needle_rows(self))]
        if self.coarse and self.coarse["layers"]:
            parts += [f"Attention recall at k = {self.coarse['k']:,}, by layer:"]
            parts += [markdown_table(candidate_rows(self.coarse))]
        return "\n\n".join([*parts, markdown_facts(self.about)]) + "\n"

    def to_html(self) -> str:
        """One page with plots, that needs no other file."""
        return parity_page(self)


def _kind_rows(report: ParityResults) -> list[tuple[str, ...]]:
    kinds = report.variants["dsa"]["by_kind"].items()
    rows = [
        (kind, str(row["n"]), f"{row['second_half']:.4f}", interval_text(row["over_dense"]))
        for kind, row in kinds
    ]
    return [("kind", "texts", "loss", "over dense (95 % interval)"), *rows]


def _sweep_rows(report: ParityResults) -> list[tuple[str, ...]]:
    over = {(point["k"], point["variant"]): point["over_dense"] for point in report.sweep}
    names = list(dict.fromkeys(name for _, name in over))
    rows = [
        (str(k), *(signed_percent(over[k, name]) for name in names)) for k in sorted({k for k, _ in over})
    ]
    return [("k", *names), *rows]


def _needle_rows(report: ParityResults) -> list[tuple[str, ...]]:
    header = ("task", "length", "texts", "dense", "DSA", "only dense", "only DSA")
    rows = []
    for row in report.needles["differences"]:
        pairs = row["pairs"]
        only = [pairs[name] for name in ("dense_only", "dsa_only")]
        counts = (f"{pairs['both'] + alone} of {row['n']}" for alone in only)
        cell = (row["task"], str(row["length"]), str(row["texts"]))
        rows.append((*cell, *counts, *map(str, only), points_text(row["dsa_minus_dense"])))
    return [(*header, "DSA − dense, points (95 % interval)"), *rows]
