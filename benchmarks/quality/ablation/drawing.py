"""The Markdown page and the plot of the ablations, from their JSON lines alone."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality.ablation.cells import read_rows
from benchmarks.quality.ablation.measuring import mean
from fulmen.evaluation.style import legend_above, new_figure
from fulmen.evaluation.wording import percent, signed_percent

Row = dict[str, Any]
PAGE, PLOT = "ablations.md", "ablations.svg"
# What an index shared by two layers may cost over one for each.
SHARING_REACH = 0.002
INTRODUCTION = """# Ablations

Written by `python -m benchmarks.quality.ablation.run table` from what the other commands of that file
measured. Percentages: mean loss over the dense model's, second half of held-out texts. Recall: share of the
attention that the selection holds, and that the best k keys would, mean over layers. Bytes: index keys of all
layers per token.
"""
LINE_STYLES = {"inherit": ("#0072b2", "o"), "random": ("#d55e00", "s")}


def write_table(out: Path, docs: Path) -> None:
    """Write `docs`/ablations.md, a section per ablation that `out` has lines of, and the plot of `init`."""
    parts = [INTRODUCTION]
    docs.mkdir(parents=True, exist_ok=True)
    for name, section in SECTIONS.items():
        if rows := latest(read_rows(out / f"{name}.jsonl")):
            parts.append(f"{section(rows)}\n\n{_setting_text(rows)}\n")
            if name == "init":
                parts.append(f"![Loss over dense against tokens of warm-up]({PLOT})\n")
                draw_init(rows, docs / PLOT)
    (docs / PAGE).write_text("\n".join(parts), encoding="utf-8")


def latest(rows: Sequence[Row]) -> list[Row]:
    """The rows that were measured under the setting of the last one."""
    return [row for row in rows if row["setting"] == rows[-1]["setting"]]


def _setting_text(rows: Sequence[Row]) -> str:
    setting = rows[0]["setting"]
    k = f", k = {setting['topk']}" if "topk" in setting else ""
    kinds = " and ".join(f"{len(losses)} texts of {kind}" for kind, losses in rows[0]["losses"].items())
    return f"S = {setting['length']}{k}; {kinds}; seed {setting['seed']}; weights {setting['model']}."


def _markdown(title: str, head: Sequence[str], body: Sequence[Sequence[Any]]) -> str:
    lines = [f"| {' | '.join(map(str, line))} |" for line in (head, ["---"] * len(head), *body)]
    return "\n".join([f"## {title}\n", *lines])


def _kinds(row: Row) -> list[str]:
    return list(row["over_dense"])


def _over(row: Row) -> list[str]:
    return [signed_percent(row["over_dense"][kind]) for kind in _kinds(row)]


def _recall(row: Row) -> str:
    return "–" if row["captured"] is None else f"{row['captured']:.3f} / {row['oracle']:.3f}"


def _thousands(tokens: int) -> str:
    return f"{tokens / 1024:.0f}K" if tokens >= 1024 else str(tokens)


def _init(rows: Sequence[Row]) -> str:
    body = [
        [cell["init"], f"{cell['rate']:g}", _thousands(cell["tokens"]), *_over(row), _recall(row)]
        for row in rows
        if (cell := row["cell"])
    ]
    head = ["indexer", "learning rate", "tokens", *_kinds(rows[0]), "recall"]
    return _markdown("Inherited or random indexer", head, body)


def _shape(rows: Sequence[Row]) -> str:
    body = [
        [
            f"{cell['heads']} x {2 * cell['pairs']}",
            _thousands(cell["tokens"]),
            *_over(row),
            _recall(row),
            row["index_key_bytes"],
        ]
        for row in rows
        if (cell := row["cell"])
    ]
    head = ["index heads x width", "tokens of warm-up", *_kinds(rows[0]), "recall", "bytes"]
    return _markdown("Index heads and width", head, body)


def _stages(rows: Sequence[Row]) -> str:
    body = []
    for row in rows:
        cell = row["cell"]
        control = ", never sparse" if cell["k_schedule"] == "dense" else ""
        tokens = _thousands(cell["tokens"])
        body.append([", ".join(cell["stages"]) + control, tokens, cell["read"], *_over(row), _recall(row)])
    head = ["stages", "tokens of sparse", "read", *_kinds(rows[0]), "recall"]
    return _markdown("Stages", head, body)


def _topk(rows: Sequence[Row]) -> str:
    ordered = sorted(rows, key=lambda row: row["cell"]["topk"])
    body = [[row["cell"]["topk"], *_over(row), _recall(row)] for row in ordered]
    return _markdown("Keys that a query keeps", ["k", *_kinds(rows[0]), "recall"], body)


def _keys(rows: Sequence[Row]) -> str:
    body = [[row["cell"]["keys"], *_over(row), _recall(row), row["index_key_bytes"]] for row in rows]
    return _markdown("Precision of index keys", ["index keys", *_kinds(rows[0]), "recall", "bytes"], body)


def _sharing(rows: Sequence[Row]) -> str:
    body = []
    for row in rows:
        cell = row["cell"]
        body.append(
            [
                f"{cell['size']}, the first {cell['apart']} apart" if cell["apart"] else cell["size"],
                "own" if cell["own_k"] else "mean",
                _thousands(cell["tokens"]),
                *_over(row),
                _over_unshared(row, rows),
                row["index_key_bytes"],
                f"{row['index_flops'] / 1e6:.1f}",
                f"{row['select_s']:.2f}",
            ]
        )
    head = ["layers to an index", "their k", "tokens of warm-up", *_kinds(rows[0]), "over unshared"]
    head += ["bytes", "index MFLOPs of the last token", "s to select, a text"]
    return _markdown("One index for neighbouring layers", head, body) + "\n\n" + _reach(rows)


def _levels(rows: Sequence[Row]) -> str:
    measured = [row for row in rows if "over_one_level" in row]
    body = [
        [
            *(row["cell"][name] for name in ("dims", "heads", "factor", "bits")),
            row["key_bytes"],
            *map(signed_percent, row["over_one_level"].values()),
            "–" if row["candidates"] is None else f"{row['candidates']:.4f} / {row['least']:.4f}",
        ]
        for row in measured
    ]
    head = ["dims", "heads", "candidates over k", "bits", "bytes a key", *rows[0]["losses"]]
    head.append("attention on candidates, mean / least of layers")
    note = "Percentages here: loss over that of one level."
    return _markdown("A coarse level before the index", head, body) + f"\n\n{note}"


def _over_unshared(row: Row, rows: Sequence[Row]) -> str:
    alone = unshared(row, rows)
    if alone is None or alone is row:
        return "–"
    over, error = paired(row, alone)
    return f"{signed_percent(over)} ± {percent(error)}"


def _reach(rows: Sequence[Row]) -> str:
    """What groups of two cost at best, beside what was aimed at."""
    pairs = [(row, alone) for row in rows if row["cell"]["size"] == 2 and (alone := unshared(row, rows))]
    if not pairs:
        return ""
    least = min(paired(row, alone)[0] for row, alone in pairs)
    verdict = "reached" if least <= SHARING_REACH else "missed"
    return "\n".join(
        (
            "Over unshared: loss over that of the model with an index per layer and the same warm-up, mean",
            "and standard error over all texts. Layers with a k of their own share scores, not the",
            "selection; here each computed them again. Two layers to an index cost",
            f"{signed_percent(least)} at least; the aim of {signed_percent(SHARING_REACH)} is {verdict}.",
        )
    )


def unshared(row: Row, rows: Sequence[Row]) -> Row | None:
    """The row with an index per layer and as much warm-up."""
    same = (one for one in rows if one["cell"]["tokens"] == row["cell"]["tokens"])
    return next((one for one in same if one["cell"]["size"] == 1), None)


def paired(row: Row, other: Row) -> tuple[float, float]:
    """Mean and standard error over texts of a row's loss over another's, minus 1; NaN error of one text."""
    texts = [
        mine / theirs - 1
        for kind in _kinds(row)
        for mine, theirs in zip(row["losses"][kind], other["losses"][kind], strict=True)
    ]
    centre = mean(texts)
    if len(texts) < 2:
        return centre, math.nan
    variance = sum((text - centre) ** 2 for text in texts) / (len(texts) - 1)
    return centre, math.sqrt(variance / len(texts))


SECTIONS: dict[str, Callable[[Sequence[Row]], str]] = {
    "init": _init,
    "shape": _shape,
    "stages": _stages,
    "topk": _topk,
    "keys": _keys,
    "sharing": _sharing,
    "levels": _levels,
}


def draw_init(rows: Sequence[Row], file: Path) -> None:
    """Mean of the kinds' loss over dense against tokens, a line for each indexer and learning rate."""
    from matplotlib import rc_context

    figure, axes = new_figure(3.4)
    figure.patch.set(facecolor="white", alpha=1)
    lines: dict[tuple[str, float], list[tuple[int, float]]] = {}
    for row in rows:
        cell, over = row["cell"], mean(list(row["over_dense"].values()))
        lines.setdefault((cell["init"], cell["rate"]), []).append((cell["tokens"], 100 * over))
    for number, ((name, rate), points) in enumerate(lines.items()):
        color, marker = LINE_STYLES[name]
        tokens, shares = zip(*sorted(points), strict=True)
        style = {"color": color, "marker": marker, "linestyle": ("-", "--", ":")[number % 3]}
        axes.plot([t / 1024 for t in tokens], shares, label=f"{name}, {rate:g}", linewidth=1.8, **style)
    axes.set(xlabel="tokens of warm-up (K)", ylabel="loss over dense (%)")
    axes.set_yscale("symlog", linthresh=1.0)  # from tenths to hundreds, and below 0 as well
    legend_above(axes)
    with rc_context({"svg.hashsalt": "fulmen"}):
        figure.savefig(file, metadata={"Date": None})
