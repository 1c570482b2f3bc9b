"""Means, ratios and intervals of a parity measurement, as plain JSON types, and its summary in words."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from fulmen.evaluation.parity.needles import sample_groups
from fulmen.evaluation.statistics import (
    Interval,
    clustered_difference_interval,
    paired_ratio_interval,
    wilson_interval,
)

VARIANT_LABELS = {
    "dense": "dense",
    "oracle": "oracle (true top-k)",
    "dsa": "DSA",
    "inherited": "DSA, inherited only",
    "window": "window + sinks",
    "random": "random keys",
}
# The loss over dense that still counts as parity.
PARITY_MARGIN = 0.01
DEPTH_BUCKETS = 5
# Who was right: (dense, DSA).
PAIRS = {
    "both": (True, True),
    "dense_only": (True, False),
    "dsa_only": (False, True),
    "neither": (False, False),
}


def variant_table(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Per variant: means over the windows, and the ratio to dense over all and by kind of text."""
    return {name: _variant_row(records, name) for name in records[0]["scores"]}


def sweep_point(
    variant: str, topk: int, losses: Sequence[float], dense_losses: Sequence[float]
) -> dict[str, Any]:
    """One point of the sweep over k."""
    over_dense = fmean(losses) / fmean(dense_losses) - 1
    return {"variant": variant, "k": topk, "loss": fmean(losses), "over_dense": over_dense}


def error_split(variants: Mapping[str, Any], kernel: Mapping[str, Any]) -> dict[str, Any]:
    """Where DSA's loss over dense comes from, nats per token.

    budget: what the oracle loses; indexer: what DSA loses beyond it (below 0 where DSA does better: the mean
    over heads is not the best of targets); kernel: fast backend minus reference, on a shorter text.
    """
    loss = {name: row["second_half"] for name, row in variants.items()}
    return {
        "budget": loss["oracle"] - loss["dense"],
        "indexer": loss["dsa"] - loss["oracle"],
        "kernel": kernel["fast"] - kernel["reference"],
        "kernel_length": kernel["length"],
        "kernel_topk": kernel["topk"],
    }


def needle_tables(samples: Sequence[Any], answers: Mapping[str, Sequence[bool]]) -> dict[str, Any]:
    """Accuracy per task, length, depth and variant; and DSA minus dense, pair by pair, in points.

    `depth` is the lower end of a fifth of the text. `pairs` counts who was right, `texts` the texts asked
    about: questions about one text are alike, which the interval takes into account.
    """
    groups: dict[tuple, list[int]] = {}
    for place, sample in enumerate(samples):
        groups.setdefault((_task_name(sample), sample.length, _depth_bucket(sample)), []).append(place)
    cells = [
        {"task": task, "length": length, "depth": depth, "variant": variant, **_accuracy(right, places)}
        for (task, length, depth), places in sorted(groups.items())
        for variant, right in answers.items()
    ]
    pooled: dict[tuple, list[int]] = {}
    for (task, length, _), places in sorted(groups.items()):
        pooled.setdefault((task, length), []).extend(places)
    differences = [
        # In their own order: the questions about one text are neighbours.
        {"task": task, "length": length, "n": len(places), **_paired(samples, answers, sorted(places))}
        for (task, length), places in pooled.items()
    ]
    everything = list(range(len(samples)))
    overall = {name: _accuracy(right, everything) for name, right in answers.items()} if samples else {}
    nothing = {"dsa_minus_dense": None, "pairs": None, "texts": 0}
    total = _paired(samples, answers, everything) if samples else nothing
    return {"cells": cells, "differences": differences, "overall": overall, **total}


def source_table(records: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The dense variant, and DSA, against the model before conversion; None if that was not run."""
    if "source" not in records[0]:
        return None
    source = [record["source"]["second_half"] for record in records]
    dense, dsa = (_second_half(records, name) for name in ("dense", "dsa"))
    return {
        "second_half": fmean(source),
        "max_window_difference": max(abs(a - b) for a, b in zip(source, dense, strict=True)),
        "max_token_difference": max(record["source"]["max_token_difference"] for record in records),
        "dsa_over_source": _over(dsa, source),
    }


def short_summary(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Rows of a table for people, the header first; the same in terminal, README and report."""
    needles = result["needles"]["overall"]
    header = ["variant", "loss", "over dense (95 % interval)", "worse kind", "same next token", "KL to dense"]
    rows: list[tuple[str, ...]] = [(*header, "needles") if needles else tuple(header)]
    for name, row in result["variants"].items():
        cells = [VARIANT_LABELS[name], f"{row['second_half']:.4f}"]
        if name == "dense":
            cells += ["", "", "", ""]
        else:
            cells += [interval_text(row["over_dense"]), worse_kind_text(row)]
            cells += [f"{row['agreement']:.1%}", f"{row['kl']:.4f}"]
        if needles:
            found = needles.get(name)
            cells.append(f"{found['right']} of {found['n']}" if found else "")
        rows.append(tuple(cells))
    return rows


def verdict(result: Mapping[str, Any]) -> str:
    """The headline in plain words."""
    row, length, topk = result["variants"]["dsa"], result["length"], result["topk"]
    if topk >= length:
        return f"Nothing was tested: k = {topk} covers all {length} tokens, so DSA is dense attention here."
    worse = row["by_kind"][row["worse_kind"]]["over_dense"]
    finding = f"with {topk} of {length} tokens kept, the loss is {_above_or_below(worse['estimate'])} dense"
    kind = f"{row['worse_kind']} text" + (", the worse kind" if len(row["by_kind"]) > 1 else "")
    finding = f"{finding} on {kind} ({limits_text(worse)})"
    if worse["high"] is None:
        return f"Not shown: {finding}; measure more windows."
    if worse["high"] <= PARITY_MARGIN:
        return f"Parity: {finding}, within the margin of {PARITY_MARGIN:.0%}."
    if worse["low"] > PARITY_MARGIN:
        return f"No parity: {finding}, beyond the margin of {PARITY_MARGIN:.0%}."
    return f"Not shown: {finding}; the interval reaches beyond the margin of {PARITY_MARGIN:.0%}."


def needle_verdict(result: Mapping[str, Any]) -> str:
    """Retrieval in plain words; empty without needles."""
    found = result["needles"]
    if not found["overall"]:
        return ""
    dsa, dense = found["overall"]["dsa"], found["overall"]["dense"]
    pairs, gap = found["pairs"], found["dsa_minus_dense"]
    limits = "no interval from one text"
    if gap["low"] is not None:
        limits = f"95 % interval {gap['low']:+.1f} to {gap['high']:+.1f}"
    return (
        f"Retrieval: DSA answers {dsa['right']} of {dsa['n']} questions about {found['texts']} texts, dense "
        f"{dense['right']}: {gap['estimate']:+.1f} points ({limits}). Both right {pairs['both']}, only dense "
        f"{pairs['dense_only']}, only DSA {pairs['dsa_only']}, neither {pairs['neither']}."
    )


def source_verdict(result: Mapping[str, Any]) -> str:
    """The comparison with the model before conversion, in plain words; empty without it."""
    source = result["source"]
    if source is None:
        return ""
    over = source["dsa_over_source"]
    return (
        f"Against the model before conversion: its dense loss and ours differ by at most "
        f"{source['max_window_difference']:.1e} nats per token on a text; DSA's loss is "
        f"{_above_or_below(over['estimate'])} it ({limits_text(over)})."
    )


def percent(share: float) -> str:
    """A signed percentage."""
    return f"{share:+.2%}"


def limits_text(interval: Mapping[str, Any]) -> str:
    """The limits of an interval of shares."""
    if interval["low"] is None:
        return "no interval from one window"
    return f"95 % interval {percent(interval['low'])} to {percent(interval['high'])}"


def interval_text(interval: Mapping[str, Any]) -> str:
    """Estimate and limits of an interval of shares, short."""
    if interval["low"] is None:
        return percent(interval["estimate"])
    return f"{percent(interval['estimate'])} ({percent(interval['low'])} to {percent(interval['high'])})"


def points_text(interval: Mapping[str, Any]) -> str:
    """Estimate and limits of an interval in points."""
    if interval["low"] is None:
        return f"{interval['estimate']:+.1f} (no interval from one text)"
    return f"{interval['estimate']:+.1f} ({interval['low']:+.1f} to {interval['high']:+.1f})"


def worse_kind_text(row: Mapping[str, Any]) -> str:
    """The loss over dense of the worse kind of text, with its name."""
    return f"{percent(row['by_kind'][row['worse_kind']]['over_dense']['estimate'])} {row['worse_kind']}"


def _above_or_below(share: float) -> str:
    return f"{abs(share):.2%} {'above' if share >= 0 else 'below'}"


def _variant_row(records: Sequence[Mapping[str, Any]], name: str) -> dict[str, Any]:
    scores = [record["scores"][name] for record in records]
    by_kind: dict[str, Any] = {}
    for kind in sorted({record["kind"] for record in records}):
        of_kind = [record for record in records if record["kind"] == kind]
        losses, dense = _second_half(of_kind, name), _second_half(of_kind, "dense")
        by_kind[kind] = {"second_half": fmean(losses), "over_dense": _over(losses, dense), "n": len(of_kind)}
    by_position = [fmean(bucket) for bucket in zip(*(s["by_position"] for s in scores), strict=True)]
    dense_by_position = zip(*(record["scores"]["dense"]["by_position"] for record in records), strict=True)
    return {
        **{key: fmean(s[key] for s in scores) for key in ("second_half", "whole", "kl", "agreement")},
        "over_dense": _over(_second_half(records, name), _second_half(records, "dense")),
        "by_kind": by_kind,
        "worse_kind": max(by_kind, key=lambda kind: by_kind[kind]["over_dense"]["estimate"]),
        "by_position": by_position,
        "over_dense_by_position": [
            loss / fmean(dense) - 1 for loss, dense in zip(by_position, dense_by_position, strict=True)
        ],
    }


def _second_half(records: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    return [record["scores"][name]["second_half"] for record in records]


def _over(losses: Sequence[float], dense: Sequence[float]) -> dict[str, float | None]:
    """loss / dense loss - 1 with its interval."""
    return _as_json(Interval(*(value - 1 for value in paired_ratio_interval(losses, dense))))


def _accuracy(right: Sequence[bool], places: Sequence[int]) -> dict[str, Any]:
    n_right = sum(right[place] for place in places)
    return {"right": n_right, "n": len(places), "share": _as_json(wilson_interval(n_right, len(places)))}


def _paired(
    samples: Sequence[Any], answers: Mapping[str, Sequence[bool]], places: Sequence[int]
) -> dict[str, Any]:
    """DSA minus dense in points with its interval, who was right how often, and on how many texts."""
    dsa, dense = ([bool(answers[name][place]) for place in places] for name in ("dsa", "dense"))
    groups = sample_groups([samples[place] for place in places])
    texts = [number for number, group in enumerate(groups) for _ in group]
    interval = clustered_difference_interval(dsa, dense, texts)
    seen = Counter(zip(dense, dsa, strict=True))
    return {
        "dsa_minus_dense": _as_json(Interval(*(100 * value for value in interval))),
        "pairs": {name: seen[pair] for name, pair in PAIRS.items()},
        "texts": len(groups),
    }


def _as_json(interval: Interval) -> dict[str, float | None]:
    """JSON has no infinity: a limit that does not exist is null."""
    return {key: value if math.isfinite(value) else None for key, value in interval._asdict().items()}


def _depth_bucket(sample: Any) -> float:
    return min(int(sample.depth * DEPTH_BUCKETS), DEPTH_BUCKETS - 1) / DEPTH_BUCKETS


def _task_name(sample: Any) -> str:
    return "needle" if sample.n_keys == 1 else f"{sample.n_keys} needles"
