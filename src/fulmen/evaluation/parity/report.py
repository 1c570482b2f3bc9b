"""A parity measurement as files: JSON to compute with, Markdown for a model card, one HTML page to look at.

Each file is written atomically.
"""

import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

from fulmen import __version__
from fulmen.evaluation.parity.page import parity_page
from fulmen.evaluation.parity.tables import (
    interval_text,
    needle_verdict,
    points_text,
    short_summary,
    source_verdict,
    verdict,
)
from fulmen.files import write_file


def make_report(
    result: Mapping[str, Any], about: Mapping[str, str], cost: Sequence[Mapping[str, float]] = ()
) -> dict[str, Any]:
    """What the writers take, of plain JSON types.

    Args:
        result: of `fulmen.evaluation.parity.measure.measure_parity`.
        about: of `about_run`, with whatever else should stand in the footer.
        cost: rows of position, dense_bytes, dsa_bytes, dense_flops, dsa_flops per generated token, ascending.
    """
    return {**result, "about": dict(about), "cost": [dict(row) for row in cost]}


def about_run(model: str, command: Sequence[str] = ()) -> dict[str, str]:
    """What a reader needs to repeat the run: model, command, date, machine and versions.

    Args:
        model: its name.
        command: by default that of this process.
    """
    program, *arguments = command or sys.argv
    cores, threads = os.cpu_count(), torch.get_num_threads()
    return {
        "model": model,
        "command": " ".join((Path(program).name, *arguments)),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": f"{processor_name()}, {cores} cores, {threads} threads, {_accelerator()}",
        "versions": f"fulmen {__version__}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, Python {platform.python_version()}",
    }


def write_json(report: Mapping[str, Any], path: str | Path) -> Path:
    """Write every number. Raises OutputError if `path` cannot be written."""
    return write_file(path, json.dumps(report, indent=1, allow_nan=False) + "\n")


def write_markdown(report: Mapping[str, Any], path: str | Path) -> Path:
    """Write verdict and tables, for a model card. Raises OutputError if `path` cannot be written."""
    return write_file(path, markdown_text(report))


def write_html(report: Mapping[str, Any], path: str | Path) -> Path:
    """Write one page that needs no other file. Raises OutputError if `path` cannot be written."""
    return write_file(path, parity_page(report))


def markdown_text(report: Mapping[str, Any]) -> str:
    """Verdict, main table, and tables of kinds, budgets and needles."""
    parts = ["## Parity with dense attention", verdict(report)]
    parts += [text for text in (needle_verdict(report), source_verdict(report)) if text]
    parts += [markdown_table(short_summary(report))]
    parts += ["By kind of text (DSA):", markdown_table(_kind_rows(report))]
    if report["sweep"]:
        parts += ["Loss over dense by budget k:", markdown_table(_sweep_rows(report))]
    if report["needles"]["differences"]:
        parts += ["Needles answered:", markdown_table(_needle_rows(report))]
    parts.append("\n".join(f"- {name}: {value}" for name, value in report["about"].items()))
    return "\n\n".join(parts) + "\n"


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """A table whose first row is the header."""
    header, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([header, "|" + " --- |" * len(rows[0]), *body])


def _kind_rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    kinds = report["variants"]["dsa"]["by_kind"].items()
    rows = [
        (kind, str(row["n"]), f"{row['second_half']:.4f}", interval_text(row["over_dense"]))
        for kind, row in kinds
    ]
    return [("kind", "texts", "loss", "over dense (95 % interval)"), *rows]


def _sweep_rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    over = {(point["k"], point["variant"]): point["over_dense"] for point in report["sweep"]}
    names = list(dict.fromkeys(name for _, name in over))
    rows = [(str(k), *(f"{over[k, name]:+.2%}" for name in names)) for k in sorted({k for k, _ in over})]
    return [("k", *names), *rows]


def _needle_rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    header = ("task", "length", "texts", "dense", "DSA", "only dense", "only DSA")
    rows = []
    for row in report["needles"]["differences"]:
        pairs = row["pairs"]
        only = [pairs[name] for name in ("dense_only", "dsa_only")]
        counts = (f"{pairs['both'] + alone} of {row['n']}" for alone in only)
        place = (row["task"], str(row["length"]), str(row["texts"]))
        rows.append((*place, *counts, *map(str, only), points_text(row["dsa_minus_dense"])))
    return [(*header, "DSA − dense, points (95 % interval)"), *rows]


def processor_name() -> str:
    """The processor's name, which Python itself does not know on Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _accelerator() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
