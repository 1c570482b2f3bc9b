"""Means, ratios and intervals of a parity measurement, as plain JSON types."""

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from fulmen.evaluation.parity.needles import NeedleSample, sample_groups
from fulmen.evaluation.parity.results import (
    AccuracyRow,
    ErrorSplit,
    KindRow,
    NeedleCell,
    NeedleDifference,
    NeedleTables,
    PairedAnswers,
    SequenceRow,
    SourceTable,
    SweepRow,
    VariantRow,
)
from fulmen.evaluation.statistics import (
    Interval,
    IntervalRow,
    clustered_difference_interval,
    interval_row,
    paired_ratio_interval,
    wilson_interval,
)

DEPTH_BUCKETS = 5
# Who was right: (dense, DSA).
PAIRS = {
    "both": (True, True),
    "dense_only": (True, False),
    "dsa_only": (False, True),
    "neither": (False, False),
}


def variant_table(records: Sequence[SequenceRow]) -> dict[str, VariantRow]:
    """Per variant: means over the sequences, and the ratio to dense over all and by kind of text."""
    return {name: _variant_row(records, name) for name in records[0]["scores"]}


def sweep_point(variant: str, topk: int, losses: Sequence[float], dense_losses: Sequence[float]) -> SweepRow:
    """One point of the sweep over k."""
    over_dense = fmean(losses) / fmean(dense_losses) - 1
    return {"variant": variant, "k": topk, "loss": fmean(losses), "over_dense": over_dense}


def error_split(variants: Mapping[str, VariantRow], kernel: Mapping[str, Any]) -> ErrorSplit:
    """Where DSA's loss over dense comes from, nats per token.

    budget: what the oracle loses; indexer: what DSA in one level with the same k in each layer loses beyond
    it (below 0 where DSA does better: the mean over heads is not the best of targets); split_of_k: what it
    loses beyond that by the model's own k in each layer; coarse: what two levels lose beyond one, where this
    k asks the coarse one; kernel: fast backend minus reference, on a shorter text.
    """
    loss = {name: row["second_half"] for name, row in variants.items()}
    one = loss.get("one_level", loss["dsa"])
    equal = loss.get("dsa_equal", one)
    split: ErrorSplit = {
        "budget": loss["oracle"] - loss["dense"],
        "indexer": equal - loss["oracle"],
        "split_of_k": one - equal,
        "kernel": kernel["fast"] - kernel["reference"],
        "kernel_length": kernel["length"],
        "kernel_topk": kernel["topk"],
    }
    if "one_level" in loss:
        split["coarse"] = loss["dsa"] - one
    return split


def needle_tables(samples: Sequence[NeedleSample], answers: Mapping[str, Sequence[bool]]) -> NeedleTables:
    """Accuracy per task, length, depth and variant; and DSA minus dense, pair by pair, in points.

    `depth` is the lower end of a fifth of the text. `pairs` counts who was right, `texts` the texts asked
    about: questions about one text are alike, which the interval takes into account.
    """
    groups: dict[tuple, list[int]] = {}
    for index, sample in enumerate(samples):
        groups.setdefault((_task_name(sample), sample.length, _depth_bucket(sample)), []).append(index)
    cells: list[NeedleCell] = [
        {"task": task, "length": length, "depth": depth, "variant": variant, **_accuracy(right, indices)}
        for (task, length, depth), indices in sorted(groups.items())
        for variant, right in answers.items()
    ]
    pooled: dict[tuple, list[int]] = {}
    for (task, length, _), indices in sorted(groups.items()):
        pooled.setdefault((task, length), []).extend(indices)
    differences: list[NeedleDifference] = [
        # In their own order: the questions about one text are neighbours.
        {"task": task, "length": length, "n": len(indices), **_paired(samples, answers, sorted(indices))}
        for (task, length), indices in pooled.items()
    ]
    everything = list(range(len(samples)))
    overall = {name: _accuracy(right, everything) for name, right in answers.items()} if samples else {}
    total = _paired(samples, answers, everything) if samples else None
    return {
        "cells": cells,
        "differences": differences,
        "overall": overall,
        "dsa_minus_dense": total["dsa_minus_dense"] if total else None,
        "pairs": total["pairs"] if total else None,
        "texts": total["texts"] if total else 0,
    }


def source_table(records: Sequence[SequenceRow]) -> SourceTable | None:
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


def _variant_row(records: Sequence[SequenceRow], name: str) -> VariantRow:
    scores = [record["scores"][name] for record in records]
    by_kind: dict[str, KindRow] = {}
    for kind in sorted({record["kind"] for record in records}):
        of_kind = [record for record in records if record["kind"] == kind]
        losses, dense = _second_half(of_kind, name), _second_half(of_kind, "dense")
        by_kind[kind] = {"second_half": fmean(losses), "over_dense": _over(losses, dense), "n": len(of_kind)}
    by_position = [fmean(bucket) for bucket in zip(*(s["by_position"] for s in scores), strict=True)]
    dense_by_position = zip(*(record["scores"]["dense"]["by_position"] for record in records), strict=True)
    return {
        "second_half": fmean(s["second_half"] for s in scores),
        "whole": fmean(s["whole"] for s in scores),
        "kl": fmean(s["kl"] for s in scores),
        "agreement": fmean(s["agreement"] for s in scores),
        "over_dense": _over(_second_half(records, name), _second_half(records, "dense")),
        "by_kind": by_kind,
        "worse_kind": max(by_kind, key=lambda kind: by_kind[kind]["over_dense"]["estimate"]),
        "by_position": by_position,
        "over_dense_by_position": [
            loss / fmean(dense) - 1 for loss, dense in zip(by_position, dense_by_position, strict=True)
        ],
    }


def _second_half(records: Sequence[SequenceRow], name: str) -> list[float]:
    return [record["scores"][name]["second_half"] for record in records]


def _over(losses: Sequence[float], dense: Sequence[float]) -> IntervalRow:
    """loss / dense loss - 1 with its interval."""
    return interval_row(Interval(*(value - 1 for value in paired_ratio_interval(losses, dense))))


def _accuracy(right: Sequence[bool], indices: Sequence[int]) -> AccuracyRow:
    n_right = sum(right[index] for index in indices)
    return {
        "right": n_right,
        "n": len(indices),
        "share": interval_row(wilson_interval(n_right, len(indices))),
    }


def _paired(
    samples: Sequence[NeedleSample], answers: Mapping[str, Sequence[bool]], indices: Sequence[int]
) -> PairedAnswers:
    """DSA minus dense in points with its interval, who was right how often, and on how many texts."""
    dsa, dense = ([bool(answers[name][index]) for index in indices] for name in ("dsa", "dense"))
    groups = sample_groups([samples[index] for index in indices])
    texts = [number for number, group in enumerate(groups) for _ in group]
    interval = clustered_difference_interval(dsa, dense, texts)
    seen = Counter(zip(dense, dsa, strict=True))
    return {
        "dsa_minus_dense": interval_row(Interval(*(100 * value for value in interval))),
        "pairs": {name: seen[pair] for name, pair in PAIRS.items()},
        "texts": len(groups),
    }


def _depth_bucket(sample: NeedleSample) -> float:
    return min(int(sample.depth * DEPTH_BUCKETS), DEPTH_BUCKETS - 1) / DEPTH_BUCKETS


def _task_name(sample: NeedleSample) -> str:
    return "needle" if sample.n_keys == 1 else f"{sample.n_keys} needles"
