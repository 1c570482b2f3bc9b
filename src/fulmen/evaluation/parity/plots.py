"""The figures of a parity report. Matplotlib is imported when one is drawn, and no display is needed."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fulmen.evaluation.parity.results import NeedleCell, ParityResults
from fulmen.evaluation.parity.tables import DEPTH_BUCKETS
from fulmen.evaluation.style import (
    GRID,
    INK,
    VARIANT_COLORS,
    VARIANT_LABELS,
    VARIANT_MARKERS,
    Plot,
    legend_above,
    new_figure,
    plain_ticks,
    short_count,
)
from fulmen.evaluation.wording import signed_percent

PERCENT_TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
LINEAR_PERCENT = 1.0


def parity_plots(report: ParityResults) -> list[Plot]:
    """All figures that the report has data for, in reading order."""
    drawers: list[Callable[[ParityResults], Plot | None]] = [
        _plot_by_position,
        _plot_sweep,
        _plot_error_split,
        _plot_attention_recall,
        _plot_candidates,
        _plot_lookups,
        _plot_needles,
        _plot_cost,
    ]
    plots = (draw(report) for draw in drawers)
    return [plot for plot in plots if plot is not None]


def crossover(rows: Sequence[Mapping[str, float]], unit: str) -> float | None:
    """Position from which DSA costs less than dense, on a straight line in log-log; None if it never does.

    Args:
        rows: ascending in `position`.
        unit: "bytes" or "flops".
    """
    gaps = [math.log(row[f"dsa_{unit}"] / row[f"dense_{unit}"]) for row in rows]
    if not gaps or gaps[-1] >= 0:
        return None
    last = max((place for place, gap in enumerate(gaps) if gap >= 0), default=None)
    if last is None:
        return rows[0]["position"]
    share = gaps[last] / (gaps[last] - gaps[last + 1])
    low, high = (math.log(rows[place]["position"]) for place in (last, last + 1))
    return math.exp(low + share * (high - low))


def _plot_by_position(report: ParityResults) -> Plot:
    figure, axes = new_figure(3.4)
    variants, length = report.variants, report.length
    for name in ("oracle", "dsa", "inherited", "window"):
        if name in variants:
            shares = variants[name]["over_dense_by_position"]
            centres = [(n + 0.5) * length / len(shares) for n in range(len(shares))]
            _draw_line(axes, name, centres, [100 * share for share in shares])
    _percent_axis(axes)
    if (topk := report.topk) < length:
        axes.axvline(topk, color=INK, linewidth=0.8, linestyle=":")
        axes.annotate(f" k = {topk}", (topk, 0.02), xycoords=("data", "axes fraction"), color=INK)
    axes.set(xlabel="position in the text (tokens)", ylabel="loss over dense (%)", xlim=(0, length))
    legend_above(axes)
    caption = "Loss over dense attention by position: left of k nothing is left out, so the gap begins there."
    return Plot("position", "Loss by position", caption, figure)


def _plot_sweep(report: ParityResults) -> Plot | None:
    if not report.sweep:
        return None
    figure, axes = new_figure(3.4)
    for name in ("oracle", "dsa", "window"):
        points = [point for point in report.sweep if point["variant"] == name]
        _draw_line(axes, name, [p["k"] for p in points], [100 * p["over_dense"] for p in points])
    _percent_axis(axes)
    axes.set_xscale("log", base=2)
    plain_ticks(axes.xaxis, sorted({point["k"] for point in report.sweep}))
    axes.set(xlabel="keys kept per query, k (tokens)", ylabel="loss over dense (%)")
    legend_above(axes)
    caption = "Loss over dense attention for smaller and larger budgets k, on the first text of each kind."
    return Plot("sweep", "Loss against budget", caption, figure)


def _plot_error_split(report: ParityResults) -> Plot:
    figure, axes = new_figure(2.3 if "coarse" not in report.error_split else 2.6)
    split, dense = report.error_split, report.variants["dense"]["second_half"]
    one = "one level" if "coarse" in split else "DSA"
    labels = ["kernel: fast − reference", f"indexer: {one} − oracle", "budget: oracle − dense"]
    values, names = [split["kernel"], split["indexer"], split["budget"]], ["random", "dsa", "oracle"]
    if "dsa_equal" in report.variants:
        labels[1:2] = [f"split of k: {one} − equal k", "indexer: equal k − oracle"]
        values[1:1], names[1:1] = [split.get("split_of_k", 0.0)], ["dsa_equal"]
    if "coarse" in split:
        labels.insert(1, "coarse level: two levels − one")
        values.insert(1, split["coarse"])
        names.insert(1, "one_level")
    colors = [VARIANT_COLORS[name] for name in names]
    axes.barh(labels, values, color=colors, height=0.6)
    reach = max((abs(value) for value in values), default=0) or 1e-6
    for place, value in enumerate(values):
        # A kernel's error is far below the digits that the other two need.
        text = f"{value:+.4f} ({signed_percent(value / dense)})" if abs(value) >= 5e-5 else f"{value:.0e}"
        axes.text(max(value, 0) + 0.03 * reach, place, text, va="center", color=INK, fontsize=9)
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set(
        xlabel="loss (nats per token)", xlim=(min(0, *values) - 0.05 * reach, max(0, *values) + 0.95 * reach)
    )
    axes.grid(axis="y", visible=False)
    axes.locator_params(axis="x", nbins=5)
    caption = (
        "Where the loss over dense comes from: the budget k, the indexer's choice, what each layer gets of k "
        "(where that differs), and the kernel."
    )
    return Plot("split", "Where the loss comes from", caption, figure)


def _plot_attention_recall(report: ParityResults) -> Plot | None:
    recalls = {name: rows for name, rows in report.attention_recall.items() if rows}
    if not recalls:
        return None
    figure, axes = new_figure(3.4)
    best = recalls.get("dsa") or next(iter(recalls.values()))
    _draw_line(axes, "oracle", [row["layer"] for row in best], [100 * row["oracle"] for row in best])
    for name, rows in recalls.items():
        _draw_line(axes, name, [row["layer"] for row in rows], [100 * row["captured"] for row in rows])
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="layer", ylabel="attention recall (%)")
    legend_above(axes)
    caption = (
        "Attention that falls on the selected keys, averaged over heads: local keys dominate it, so a small "
        "difference here can be a large one in retrieval."
    )
    return Plot("recall", "Attention recall by layer", caption, figure)


def _plot_candidates(report: ParityResults) -> Plot | None:
    if not report.coarse or not (rows := report.coarse["layers"]):
        return None
    figure, axes = new_figure(3.4)
    layers = [row["layer"] for row in rows]
    _draw_line(axes, "candidates", layers, [100 * row["candidates"] for row in rows])
    _draw_line(axes, "oracle", layers, [100 * row["oracle"] for row in rows])
    _draw_line(axes, "one_level", layers, [100 * row["one_level"] for row in rows])
    _draw_line(axes, "dsa", layers, [100 * row["two_levels"] for row in rows])
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="layer", ylabel="attention recall (%)")
    legend_above(axes)
    caption = (
        f"Attention on the {report.coarse['candidates']:,} candidates of the coarse level, on the "
        f"{report.coarse['k']:,} keys that two levels and one level would keep, and on the best, at queries "
        f"that see more than {report.coarse['asked_from']:,} tokens."
    )
    return Plot("candidates", "Attention recall of candidates by layer", caption, figure)


def _plot_lookups(report: ParityResults) -> Plot | None:
    if not report.lookups:
        return None
    found = report.lookups
    dense = next(row for row in found["rows"] if row["variant"] == "dense")
    shown = [row for row in found["rows"] if row["n"] == dense["n"]]
    ks = sorted({row["k"] for row in shown if row["variant"] != "dense"})
    figure, axes = new_figure(3.4)
    for variant in dict.fromkeys(row["variant"] for row in shown):
        rows = sorted((row for row in shown if row["variant"] == variant), key=lambda row: row["k"])
        points = [(k, dense) for k in ks] if variant == "dense" else [(row["k"], row) for row in rows]
        x, y = [k for k, _ in points], [100 * row["share"]["estimate"] for _, row in points]
        _draw_line(axes, variant, x, y)
        if variant in ("dense", "dsa"):
            low = [100 * (row["share"]["low"] or 0.0) for _, row in points]
            high = [100 * (row["share"]["high"] or 0.0) for _, row in points]
            axes.fill_between(x, low, high, color=VARIANT_COLORS[variant], alpha=0.15, linewidth=0)
    axes.set_xscale("log", base=2)
    plain_ticks(axes.xaxis, ks)
    axes.set(xlabel="keys kept per query, k (tokens)", ylabel="right answers (%)", ylim=(-3, 103))
    legend_above(axes)
    caption = (
        f"Answers that were written to {dense['n']} questions about {found['texts']} texts of "
        f"{found['length']:,} tokens; shaded: the 95 % intervals of dense and DSA."
    )
    return Plot("lookups", "Look-ups answered", caption, figure)


def _plot_needles(report: ParityResults) -> Plot | None:
    cells = report.needles["cells"]
    if not cells:
        return None
    tasks = sorted({cell["task"] for cell in cells})
    depths = sorted({cell["depth"] for cell in cells})
    figure, grid = new_figure(0.9 + len(tasks) * (0.75 + 0.3 * len(depths)), rows=len(tasks), columns=2)
    for row, task in zip(grid, tasks, strict=True):
        for axes, variant in zip(row, ("dense", "dsa"), strict=True):
            chosen = [cell for cell in cells if (cell["task"], cell["variant"]) == (task, variant)]
            _draw_heat_map(axes, chosen, depths)
            axes.set_title(f"{task}, {VARIANT_LABELS[variant]}", fontsize=10)
            axes.set_xlabel("length (tokens)")
        row[0].set_ylabel("depth (%)")
        row[1].set_yticklabels([])
    caption = (
        "Right answers out of all, by length of the text and depth of the needle in it; dark is none right."
    )
    return Plot("needles", "Retrieval: dense and DSA", caption, figure)


def _plot_cost(report: ParityResults) -> Plot | None:
    rows = report.cost
    if not rows:
        return None
    figure, panels = new_figure(5.6, rows=2, columns=1)
    positions = [row["position"] for row in rows]
    for (axes,), unit, label in zip(panels, ("bytes", "flops"), ("bytes read", "FLOPs"), strict=True):
        for name in ("dense", "dsa"):
            _draw_line(axes, name, positions, [row[f"{name}_{unit}"] for row in rows])
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        plain_ticks(axes.xaxis, positions[:: -(-len(positions) // 7)])
        axes.set_ylabel(f"{label} per token")
        if (place := crossover(rows, unit)) is not None:
            axes.axvline(place, color=INK, linewidth=0.8, linestyle=":")
            note = f" DSA is cheaper\n from {short_count(place)}"
            axes.annotate(note, (place, 0.8), xycoords=("data", "axes fraction"), color=INK, fontsize=9)
    panels[-1][0].set_xlabel("position (tokens)")
    legend_above(panels[0][0])
    caption = "What one generated token costs in attention and indexer at a position; dotted: the crossover."
    return Plot("cost", "Cost against position", caption, figure)


def _draw_line(axes: Any, variant: str, x: Sequence[float], y: Sequence[float]) -> None:
    axes.plot(
        x,
        y,
        color=VARIANT_COLORS[variant],
        marker=VARIANT_MARKERS[variant],
        markersize=5,
        linewidth=1.8,
        label=VARIANT_LABELS[variant],
    )


def _percent_axis(axes: Any) -> None:
    """Linear near 0 and logarithmic beyond: 1 % and 100 % are both to be read, and below 0 as well."""
    low, high = axes.dataLim.y0, axes.dataLim.y1
    low, high = min(low, 0.0), max(high, LINEAR_PERCENT)
    axes.set_yscale("symlog", linthresh=LINEAR_PERCENT, linscale=0.6)
    ticks = [sign * tick for tick in PERCENT_TICKS if tick >= LINEAR_PERCENT / 2 for sign in (-1, 1)]
    plain_ticks(axes.yaxis, [0, *(tick for tick in ticks if low <= tick <= high)])
    axes.axhline(0, color=INK, linewidth=0.8)


def _draw_heat_map(axes: Any, cells: Sequence[NeedleCell], depths: Sequence[float]) -> None:
    lengths = sorted({cell["length"] for cell in cells})
    shares = [[math.nan] * len(lengths) for _ in depths]
    axes.grid(visible=False)
    for cell in cells:
        x, y = lengths.index(cell["length"]), depths.index(cell["depth"])
        shares[y][x] = cell["share"]["estimate"]
        ink = "#ffffff" if shares[y][x] < 0.55 else "#000000"
        text = f"{cell['right']}/{cell['n']}"
        axes.text(x + 0.5, y + 0.5, text, ha="center", va="center", color=ink, fontsize=9)
    axes.pcolormesh(shares, cmap="cividis", vmin=0, vmax=1, edgecolors=GRID, linewidth=0.6)
    axes.set_xticks([n + 0.5 for n in range(len(lengths))], [str(length) for length in lengths])
    labels = [f"{100 * depth:.0f}–{100 * (depth + 1 / DEPTH_BUCKETS):.0f}" for depth in depths]
    axes.set_yticks([n + 0.5 for n in range(len(depths))], labels)
    axes.invert_yaxis()
