"""A run of suites as one HTML page, with its drawings inside."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from fulmen.evaluation.parity.page import html_facts, html_figure, html_page, html_table
from fulmen.evaluation.parity.plots import (
    INK,
    VARIANT_COLORS,
    VARIANT_MARKERS,
    Plot,
    legend_above,
    new_figure,
)
from fulmen.evaluation.suites.report import LABELS, suite_sections
from fulmen.evaluation.suites.ruler import DENSE_CAN
from fulmen.files import write_file

# Inches of a figure beside its rows, and of a row.
FRAME, ROW = 1.1, 0.34


def write_suite_page(report: Mapping[str, Any], path: str | Path) -> Path:
    """Write the page. Raises OutputError if `path` cannot be written."""
    return write_file(path, suite_page(report))


def suite_page(report: Mapping[str, Any]) -> str:
    """The whole page."""
    title = f"Evaluation of {report['about'].get('model', 'a model')}"
    body = [f"<h1>{escape(title)}</h1>"]
    for heading, notes, rows in suite_sections(report):
        body.append(f"<h2>{escape(heading)}</h2>")
        body += [f"<p>{escape(note)}</p>" for note in notes]
        body.append(f'<div class="scroll">{html_table(rows, ["row"] * (len(rows) - 1))}</div>')
    body.append(f'<div class="figures">{"".join(html_figure(plot) for plot in suite_plots(report))}</div>')
    body.append(f"<footer>{html_facts(report['about'])}</footer>")
    return html_page(title, body)


def suite_plots(report: Mapping[str, Any]) -> list[Plot]:
    """Accuracy by task, one figure per length, and the differences; none without RULER's tasks."""
    tables = report["suites"].get("ruler")
    if not tables:
        return []
    lengths = sorted({cell["length"] for cell in tables["cells"]})
    plots = [_plot_accuracy(tables["cells"], length) for length in lengths]
    return [*plots, _plot_differences(tables["differences"])] if tables["differences"] else plots


def _plot_accuracy(cells: Sequence[Mapping[str, Any]], length: int) -> Plot:
    chosen = [cell for cell in cells if cell["length"] == length]
    tasks = list(dict.fromkeys(cell["task"] for cell in chosen))
    names = list(dict.fromkeys(cell["variant"] for cell in chosen))
    figure, axes = new_figure(FRAME + ROW * len(tasks))
    for place, name in enumerate(names):
        shares = [cell["share"] for cell in chosen if cell["variant"] == name]
        # Side by side, so that no interval hides another.
        y = [row + 0.22 * (place - (len(names) - 1) / 2) for row in range(len(tasks))]
        _draw_intervals(axes, name, shares, y, scale=100)
    axes.axvline(100 * DENSE_CAN, color=INK, linewidth=0.8, linestyle=":")
    axes.set(xlabel="right answers (%)", xlim=(-3, 103))
    _name_rows(axes, tasks)
    legend_above(axes)
    caption = (
        f"Right answers at {length} tokens with Wilson's 95 % intervals. Where dense lies left of the dotted "
        "line, the task says nothing about DSA."
    )
    return Plot(f"ruler-{length}", f"Tasks at {length} tokens", caption, figure)


def _plot_differences(rows: Sequence[Mapping[str, Any]]) -> Plot:
    figure, axes = new_figure(FRAME + 0.7 * ROW * len(rows))
    for name, telling in (("dsa", True), ("random", False)):
        chosen = [
            (place, row)
            for place, row in enumerate(rows)
            if (row["dense_can"] and row["is_sparse"]) == telling
        ]
        label = "dense can, k leaves tokens out" if telling else "says nothing about DSA"
        if chosen:
            places, found = zip(*chosen, strict=True)
            _draw_intervals(axes, name, found, places, label=label)
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set(xlabel="DSA − dense (points)")
    _name_rows(axes, [f"{row['task']}, {row['length']}" for row in rows])
    legend_above(axes)
    caption = "DSA minus dense on the same questions, in points, with paired 95 % intervals (Newcombe)."
    return Plot("ruler-differences", "DSA minus dense", caption, figure)


def _draw_intervals(
    axes: Any,
    name: str,
    found: Sequence[Mapping[str, Any]],
    y: Sequence[float],
    scale: float = 1,
    label: str | None = None,
) -> None:
    x = [scale * one["estimate"] for one in found]
    below = [max(scale * (one["estimate"] - one["low"]), 0) for one in found]
    above = [max(scale * (one["high"] - one["estimate"]), 0) for one in found]
    axes.errorbar(
        x,
        y,
        xerr=(below, above),
        fmt=VARIANT_MARKERS[name],
        color=VARIANT_COLORS[name],
        markersize=5,
        linewidth=1.4,
        capsize=2,
        label=label or LABELS[name],
    )


def _name_rows(axes: Any, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
