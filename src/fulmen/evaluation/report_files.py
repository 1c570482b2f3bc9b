"""Reports as files: JSON to compute with, Markdown for a model card, one HTML page to look at."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from fulmen.files import write_file


class Report(Protocol):
    """What every evaluation returns. It prints and writes nothing."""

    def to_dict(self) -> dict[str, Any]:
        """Every number, of plain JSON types."""
        ...

    def to_markdown(self) -> str:
        """Findings and tables."""
        ...

    def to_html(self) -> str:
        """One page that needs no other file."""
        ...


def save_report(report: Report, *, json: Path, markdown: Path, html: Path) -> list[Path]:
    """Write the three files, each whole or not at all, and return where they are.

    Raises OutputError if one cannot be written.
    """
    return [
        write_json(report.to_dict(), json),
        write_file(markdown, report.to_markdown()),
        write_file(html, report.to_html()),
    ]


def write_json(values: Mapping[str, Any], path: str | Path) -> Path:
    """Write plain JSON types. Raises OutputError if `path` cannot be written."""
    return write_file(path, json.dumps(values, indent=1, allow_nan=False) + "\n")
