"""A run of suites as a report: JSON, Markdown, one HTML page. Nothing is printed or written here."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from html import escape
from typing import Any, Self

from fulmen.errors import ConfigError
from fulmen.evaluation.html import html_facts, html_figure, html_page, html_table
from fulmen.evaluation.style import Plot
from fulmen.evaluation.suites.catalog import find_suite
from fulmen.evaluation.suites.suite import Section, Tables
from fulmen.evaluation.wording import markdown_facts, markdown_table


@dataclass(frozen=True)
class SuiteReport:
    """What suites found.

    Attributes:
        suites: tables of each, by its name, of plain JSON types; `Suite.tables` of each says what they hold.
        about: what a reader needs to repeat the run, by name.
    """

    suites: dict[str, Tables]
    about: dict[str, str] = field(default_factory=dict)

    def sections(self) -> list[Section]:
        """Each suite's findings and table, in their order."""
        return [find_suite(name).section(tables) for name, tables in self.suites.items()]

    def plots(self) -> list[Plot]:
        """Each suite's drawings, in their order."""
        return [plot for name, tables in self.suites.items() for plot in find_suite(name).plots(tables)]

    def to_dict(self) -> dict[str, Any]:
        """Every number, of plain JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """What `to_dict` wrote. Raises ConfigError for what is no report, or names an unknown suite."""
        if not isinstance(values.get("suites"), dict):
            raise ConfigError("values are no report of suites: suites missing; read suites.json")
        for name in values["suites"]:
            find_suite(name)
        return cls(suites=dict(values["suites"]), about=dict(values.get("about", {})))

    def to_markdown(self) -> str:
        """Findings and tables."""
        parts = ["# Evaluation"]
        for title, notes, rows in self.sections():
            parts += [f"## {title}", *notes, markdown_table(rows)]
        return "\n\n".join([*parts, markdown_facts(self.about)]) + "\n"

    def to_html(self) -> str:
        """One page with plots, that needs no other file."""
        title = f"Evaluation of {self.about.get('model', 'a model')}"
        body = [f"<h1>{escape(title)}</h1>"]
        for heading, notes, rows in self.sections():
            body.append(f"<h2>{escape(heading)}</h2>")
            body += [f"<p>{escape(note)}</p>" for note in notes]
            body.append(f'<div class="scroll">{html_table(rows, ["row"] * (len(rows) - 1))}</div>')
        body.append(f'<div class="figures">{"".join(map(html_figure, self.plots()))}</div>')
        body.append(f"<footer>{html_facts(self.about)}</footer>")
        return html_page(title, body)
