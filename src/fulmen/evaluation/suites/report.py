"""A run of suites in words and tables, the same for Markdown, page and console."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fulmen.evaluation.parity.report import markdown_table
from fulmen.evaluation.suites.paired import points_in_words
from fulmen.evaluation.suites.ruler import DENSE_CAN, dense_can
from fulmen.files import write_file

LABELS = {"dense": "dense", "dsa": "DSA", "window": "window + sinks"}
Rows = list[tuple[str, ...]]


class Section(NamedTuple):
    """One suite. notes: sentences above the table. rows: its table, the header first."""

    title: str
    notes: tuple[str, ...]
    rows: Rows


def suite_sections(report: Mapping[str, Any]) -> list[Section]:
    """The suites of a report, in their order."""
    makers: dict[str, Callable[[Mapping[str, Any]], Section]] = {
        "ruler": _ruler_section,
        "keyloss": _keyloss_section,
        "short": _short_section,
        "generate": _generation_section,
    }
    return [makers[name](tables) for name, tables in report["suites"].items()]


def write_suite_markdown(report: Mapping[str, Any], path: str | Path) -> Path:
    """Write notes and tables. Raises OutputError if `path` cannot be written."""
    parts = ["# Evaluation"]
    for title, notes, rows in suite_sections(report):
        parts += [f"## {title}", *notes, markdown_table(rows)]
    parts.append("\n".join(f"- {name}: {value}" for name, value in report["about"].items()))
    return write_file(path, "\n\n".join(parts) + "\n")


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


def _ruler_section(tables: Mapping[str, Any]) -> Section:
    shares = {(cell["task"], cell["length"], cell["variant"]): cell for cell in tables["cells"]}
    gaps = {(row["task"], row["length"]): row for row in tables["differences"]}
    names = list(dict.fromkeys(cell["variant"] for cell in tables["cells"]))
    header = ["task", "length", *(LABELS[name] for name in names), "strings found"]
    header += ["DSA − dense, points (95 % interval)", "p"] if gaps else []
    rows: Rows = [(*header, "note")]
    for task, length in dict.fromkeys((cell["task"], cell["length"]) for cell in tables["cells"]):
        found = [shares[task, length, name] for name in names]
        gap = gaps.get((task, length))
        cells = [task, str(length), *map(_share_text, found)]
        cells.append(" / ".join(f"{cell['found']:.0%}" for cell in found))
        if gap:
            cells += [f"{gap['estimate']:+.1f} ({gap['low']:+.1f} to {gap['high']:+.1f})", f"{gap['p']:.2g}"]
        rows.append((*cells, _ruler_note(found[0], gap)))
    notes = (
        ruler_verdict(tables),
        "Right: all expected strings are in the answer, with Wilson's 95 % interval. Found: the mean share "
        "of them, in the columns' order.",
        f"“dense cannot”: dense is right less than {DENSE_CAN:.0%} of the time, which says nothing of DSA.",
    )
    return Section("RULER's tasks", tuple(note for note in notes if note), rows)


def _ruler_note(dense: Mapping[str, Any], gap: Mapping[str, Any] | None) -> str:
    if not dense_can(dense):
        return "dense cannot"
    return "k covers it" if gap and not gap["is_sparse"] else ""


def _share_text(cell: Mapping[str, Any]) -> str:
    share = cell["share"]
    return f"{cell['right']} of {cell['n']} ({100 * share['low']:.0f}–{share['high']:.0%})"


def _keyloss_section(tables: Mapping[str, Any]) -> Section:
    names = list(next((row["losses"] for row in tables["rows"] if row["losses"]), {"dense": {}}))
    others = [name for name in names if name != "dense"]
    rows: Rows = [
        ("length", "tokens", "texts", "number", "dense", *(f"{LABELS[name]}, over dense" for name in others))
    ]
    for row in tables["rows"]:
        losses = row["losses"]
        dense = f"{losses['dense']['loss']:.4f}" if losses.get("dense") else "none"
        over = [_over_text(losses[name]) if losses.get(name) else "" for name in others]
        rows.append((str(row["length"]), row["kind"], str(row["texts"]), str(row["tokens"]), dense, *over))
    note = (
        f"Loss in nats over the second half of each text. Key tokens gain more than {tables['gain']:g} nats "
        f"from the long context and are above {tables['long_log_prob']:g} with it, as the dense model "
        "judges. Intervals are bootstrapped over texts."
    )
    return Section("Loss on key tokens", (note,), rows)


def _over_text(loss: Mapping[str, Any]) -> str:
    over = loss["over_dense"]
    limits = "" if over["low"] is None else f" ({over['low']:+.2%} to {over['high']:+.2%})"
    return f"{over['estimate']:+.2%}{limits}"


def _short_section(tables: Mapping[str, Any]) -> Section:
    rows: Rows = [("length", "must equal dense", "unequal texts", "largest logit gap", "loss − dense, nats")]
    for row in tables["rows"]:
        rows.append(
            (
                str(row["length"]),
                "yes" if row["must_be_equal"] else "no",
                f"{row['unequal']} of {row['texts']}",
                f"{row['max_difference']:.2g}",
                _interval_text(row["loss_difference"], "+.4f"),
            )
        )
    broken = [row for row in tables["rows"] if row["must_be_equal"] and row["unequal"]]
    verdict = (
        f"Regression: DSA differs from dense at {broken[0]['length']} tokens, where k = {tables['topk']} "
        "leaves nothing out."
        if broken
        else f"Up to k = {tables['topk']} tokens DSA is the dense model, logit by logit."
    )
    return Section("Short texts", (verdict,), rows)


def _generation_section(tables: Mapping[str, Any]) -> Section:
    rows: Rows = [
        ("length", "variant", "same tokens as dense (median)", "all the same", "repeated 4-grams", "− dense")
    ]
    for row in tables["rows"]:
        is_dense = row["variant"] == "dense"
        rows.append(
            (
                str(row["length"]),
                LABELS[row["variant"]],
                "" if is_dense else f"{row['agreed_median']:g}",
                "" if is_dense else f"{row['agreed_to_the_end']} of {row['texts']}",
                f"{row['repeated']:.1%}",
                "" if is_dense else _interval_text(row["repeated_minus_dense"], "+.1%"),
            )
        )
    note = f"Greedy continuations of {tables['new_tokens']} tokens; one difference changes the rest."
    return Section("Generation", (note,), rows)


def _interval_text(interval: Mapping[str, Any], spec: str) -> str:
    estimate = format(interval["estimate"], spec)
    if interval["low"] is None:
        return estimate
    return f"{estimate} ({format(interval['low'], spec)} to {format(interval['high'], spec)})"
