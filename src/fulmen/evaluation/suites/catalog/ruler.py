"""The `ruler` suite: every variant answers the same samples; accuracy and paired tests."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from fulmen.data import Document, draw_sequences, opening_ids
from fulmen.evaluation.journal import Unit
from fulmen.evaluation.statistics import interval_row, mean_interval, wilson_interval
from fulmen.evaluation.style import (
    INK,
    VARIANT_COLORS,
    VARIANT_LABELS,
    VARIANT_MARKERS,
    Plot,
    legend_above,
    new_figure,
)
from fulmen.evaluation.suites.paired import paired_points, points_in_words
from fulmen.evaluation.suites.responders import Responder
from fulmen.evaluation.suites.ruler_tasks import TASKS, find_tasks
from fulmen.evaluation.suites.samples import Task, make_sample
from fulmen.evaluation.suites.suite import Record, Rows, Section, Suite, SuiteSizes, Tables
from fulmen.evaluation.suites.word_lists import vocabulary
from fulmen.evaluation.wording import percent

# Inches of a figure beside its rows, and of a row.
FRAME, ROW = 1.1, 0.34

# Below this share of right answers the dense model cannot do a task: what DSA loses there cannot be seen.
DENSE_CAN = 0.5


def ruler_units(
    responder: Responder,
    tokenizer: Any,
    documents: Sequence[Document],
    tasks: Sequence[Task],
    lengths: Sequence[int],
    count: int,
    *,
    seed: int = 0,
) -> list[Unit]:
    """`count` samples of every task and length, one unit each. Sample n is the same whatever `count` is.

    Samples of one number share their haystack across tasks, and no two of one task do.

    Raises:
        ConfigError: a length that has no room for a task.
        CorpusError: `documents` do not fill the samples.
    """
    words, opening = vocabulary(documents), len(opening_ids(tokenizer))
    units = []
    for length in lengths:
        texts = [
            sequence.input_ids.tolist()[opening:]
            for sequence in draw_sequences(documents, tokenizer, length + opening, count, seed=seed)
        ]
        for task in tasks:
            for number, text in enumerate(texts):
                sample = make_sample(task, text, tokenizer, length, number=number, seed=seed, words=words)
                units.append(_unit(responder, sample))
    return units


def ruler_tables(records: Sequence[Mapping[str, Any]], topk: int | None) -> dict[str, Any]:
    """Plain JSON types, from the records of `ruler_units`.

    Returns:
        cells: per task, length and variant the right answers (all expected strings are there) with Wilson's
            interval, and `found`, the mean share of these strings, which is RULER's own score (section 4).
        differences: per task and length DSA - dense (`paired_points`, and of `found` with Student's t);
            `dense_can`, and `is_sparse`: whether k leaves tokens out at that length.
        pooled: DSA - dense over all questions of the cells that can tell: sparse, and the dense model can do
            them; None where there are none, or no DSA.
    """
    groups: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for record in records:
        groups.setdefault((record["task"], record["length"]), []).append(record)
    cells = [
        {"task": task, "length": length, "variant": variant, **_accuracy(rows, variant)}
        for (task, length), rows in groups.items()
        for variant in rows[0]["answers"]
    ]
    differences = [
        {"task": task, "length": length, **_difference(rows), "is_sparse": topk is not None and length > topk}
        for (task, length), rows in groups.items()
        if "dsa" in rows[0]["answers"]
    ]
    telling = {(row["task"], row["length"]) for row in differences if row["dense_can"] and row["is_sparse"]}
    pooled = [record for record in records if (record["task"], record["length"]) in telling]
    return {
        "cells": cells,
        "differences": differences,
        "pooled": paired_points(_right(pooled, "dsa"), _right(pooled, "dense")) if pooled else None,
    }


def dense_can(cell: Mapping[str, Any]) -> bool:
    """Whether the dense model answers at least half of a cell."""
    return cell["share"]["estimate"] >= DENSE_CAN


def _unit(responder: Responder, sample: Any) -> Unit:
    def run() -> dict[str, Any]:
        texts = {variant: responder.answer(sample, variant) for variant in responder.variants}
        answers = {
            variant: {"found": sample.share_found(text), "text": text} for variant, text in texts.items()
        }
        return {"expected": list(sample.expected), "answers": answers}

    tokens = (len(sample.prompt_ids) + sample.answer_tokens) * len(responder.variants)
    return Unit(("ruler", sample.task, sample.length, sample.number), tokens, run)


def _accuracy(rows: Sequence[Mapping[str, Any]], variant: str) -> dict[str, Any]:
    right = _right(rows, variant)
    share = interval_row(wilson_interval(sum(right), len(right)))
    return {"right": sum(right), "n": len(right), "share": share, "found": fmean(_found(rows, variant))}


def _difference(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    dense = _right(rows, "dense")
    gaps = [100 * (a - b) for a, b in zip(_found(rows, "dsa"), _found(rows, "dense"), strict=True)]
    return {
        **paired_points(_right(rows, "dsa"), dense),
        "found": interval_row(mean_interval(gaps)),
        "dense_can": dense_can({"share": {"estimate": fmean(dense)}}),
    }


def _found(rows: Sequence[Mapping[str, Any]], variant: str) -> list[float]:
    return [row["answers"][variant]["found"] for row in rows]


def _right(rows: Sequence[Mapping[str, Any]], variant: str) -> list[bool]:
    return [found == 1 for found in _found(rows, variant)]


def ruler_verdict(tables: Mapping[str, Any]) -> str:
    """What the tasks say of DSA, in one sentence; empty for a model without DSA."""
    if not tables["differences"]:
        return ""
    if tables["pooled"] is None:
        return (
            "Nothing was tested: on no task and length did the dense model answer half of the questions "
            "while k left tokens out."
        )
    return f"Over the tasks that the dense model can do: {points_in_words(tables['pooled'])}."


def _section(tables: Mapping[str, Any]) -> Section:
    shares = {(cell["task"], cell["length"], cell["variant"]): cell for cell in tables["cells"]}
    gaps = {(row["task"], row["length"]): row for row in tables["differences"]}
    names = list(dict.fromkeys(cell["variant"] for cell in tables["cells"]))
    header = ["task", "length", *(VARIANT_LABELS[name] for name in names), "strings found"]
    header += ["DSA − dense, points (95 % interval)", "p"] if gaps else []
    rows: Rows = [(*header, "note")]
    for task, length in dict.fromkeys((cell["task"], cell["length"]) for cell in tables["cells"]):
        found = [shares[task, length, name] for name in names]
        gap = gaps.get((task, length))
        cells = [task, str(length), *map(_share_text, found)]
        cells.append(" / ".join(f"{100 * cell['found']:.0f}" for cell in found) + " %")
        if gap:
            cells += [f"{gap['estimate']:+.1f} ({gap['low']:+.1f} to {gap['high']:+.1f})", f"{gap['p']:.2g}"]
        rows.append((*cells, _ruler_note(found[0], gap)))
    notes = (
        ruler_verdict(tables),
        "Right: all expected strings are in the answer, with Wilson's 95 % interval. Found: the mean share "
        "of them, in the columns' order.",
        f"“dense cannot”: dense answers less than {percent(DENSE_CAN, 0)}, which says nothing of DSA.",
    )
    return Section("RULER's tasks", tuple(note for note in notes if note), rows)


def _ruler_note(dense: Mapping[str, Any], gap: Mapping[str, Any] | None) -> str:
    if not dense_can(dense):
        return "dense cannot"
    return "k covers it" if gap and not gap["is_sparse"] else ""


def _share_text(cell: Mapping[str, Any]) -> str:
    share = cell["share"]
    return f"{cell['right']} of {cell['n']} ({100 * share['low']:.0f}–{100 * share['high']:.0f} %)"


def _plot_accuracy(cells: Sequence[Mapping[str, Any]], length: int) -> Plot:
    chosen = [cell for cell in cells if cell["length"] == length]
    tasks = list(dict.fromkeys(cell["task"] for cell in chosen))
    names = list(dict.fromkeys(cell["variant"] for cell in chosen))
    figure, axes = new_figure(FRAME + ROW * len(tasks))
    for index, name in enumerate(names):
        shares = [cell["share"] for cell in chosen if cell["variant"] == name]
        # Side by side, so that no interval hides another.
        y = [row + 0.22 * (index - (len(names) - 1) / 2) for row in range(len(tasks))]
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
            (height, row)
            for height, row in enumerate(rows)
            if (row["dense_can"] and row["is_sparse"]) == telling
        ]
        label = "dense can, k leaves tokens out" if telling else "says nothing about DSA"
        if chosen:
            heights, found = zip(*chosen, strict=True)
            _draw_intervals(axes, name, found, heights, label=label)
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
        label=label or VARIANT_LABELS[name],
    )


def _name_rows(axes: Any, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)


class Ruler(Suite):
    """RULER's tasks."""

    name, order = "ruler", 0
    tasks = tuple(TASKS)

    def units(
        self, responder: Any, tokenizer: Any, documents: Sequence[Document], sizes: SuiteSizes
    ) -> list[Unit]:
        tasks = find_tasks(sizes.tasks)
        return ruler_units(
            responder, tokenizer, documents, tasks, sizes.lengths, sizes.samples, seed=sizes.seed
        )

    def tables(self, records: Sequence[Record], *, topk: int | None, seed: int) -> Tables:
        return ruler_tables(records, topk)

    def section(self, tables: Tables) -> Section:
        return _section(tables)

    def plots(self, tables: Tables) -> list[Plot]:
        """Accuracy by task, one figure per length, and the differences."""
        lengths = sorted({cell["length"] for cell in tables["cells"]})
        plots = [_plot_accuracy(tables["cells"], length) for length in lengths]
        return [*plots, _plot_differences(tables["differences"])] if tables["differences"] else plots


SUITE = Ruler()
