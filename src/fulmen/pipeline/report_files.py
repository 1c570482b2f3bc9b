"""Where the program writes what it measured: named files, or beside the model, whose card gets the table."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fulmen.errors import ConfigError, OutputError

if TYPE_CHECKING:
    from fulmen.evaluation.parity.report import ParityReport
    from fulmen.evaluation.suites.report import SuiteReport

SUITE_FILES = {"json": "json", "markdown": "md", "html": "html"}


@dataclass(frozen=True)
class ParityFiles:
    """Files of one measurement of parity.

    Attributes:
        model_dir: the model that is measured. json, html, markdown: None: into `model_dir`.
    """

    model_dir: Path
    json: Path | None = None
    html: Path | None = None
    markdown: Path | None = None

    def __post_init__(self) -> None:
        for name in ("json", "html", "markdown"):
            if (path := getattr(self, name)) is not None:
                _require_place_for_file(path)

    def require_writable(self) -> None:
        """Raise OutputError if the model's folder is to be written to and cannot: before the work."""
        beside_model = None in (self.json, self.html, self.markdown)
        if beside_model and self.model_dir.is_dir() and not os.access(self.model_dir, os.W_OK):
            raise OutputError(
                f"{self.model_dir} is not writable; name other places by json, html and markdown",
                arguments=["json", "html", "markdown"],
            )

    def write(self, report: "ParityReport") -> list[Path]:
        """Write the report, and its table into the model's card; return the files. Raises OutputError."""
        from fulmen.evaluation.report_files import save_report
        from fulmen.evaluation.wording import markdown_table
        from fulmen.pipeline.model_card import fill_parity

        folder = self.model_dir
        written = save_report(
            report,
            json=self.json or folder / "parity.json",
            markdown=self.markdown or folder / "parity.md",
            html=self.html or folder / "parity.html",
        )
        fill_parity(folder, f"{report.verdict()}\n\n{markdown_table(report.summary())}")
        return written


def write_suites(report: "SuiteReport", folder: Path) -> list[Path]:
    """Write the report of a run of suites; return the files. Raises OutputError."""
    from fulmen.evaluation.report_files import save_report

    files = {name: folder / f"suites.{ending}" for name, ending in SUITE_FILES.items()}
    return save_report(report, **files)


def _require_place_for_file(path: Path) -> None:
    """Said now, not after the work whose result goes there."""
    folder = path.expanduser().absolute().parent
    if not folder.is_dir():
        raise ConfigError(f"{path} cannot be written: {path.parent} is no directory; make it first")
    if path.expanduser().is_dir():
        raise ConfigError(f"{path} is a directory; name a file")
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"{path} cannot be written: {folder} is not writable; name another place")
