"""The `ruler` suite: every variant answers the same samples; accuracy and paired tests."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from fulmen.data import Document, opening_ids, windows
from fulmen.evaluation.statistics import mean_interval, wilson_interval
from fulmen.evaluation.suites.journal import Unit
from fulmen.evaluation.suites.paired import as_json, paired_points
from fulmen.evaluation.suites.samples import Task, make_sample
from fulmen.evaluation.suites.subjects import Subject
from fulmen.evaluation.suites.word_lists import vocabulary

# Below this share of right answers the dense model cannot do a task: what DSA loses there cannot be seen.
DENSE_CAN = 0.5


def ruler_units(
    subject: Subject,
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
            window.input_ids.tolist()[opening:]
            for window in windows(documents, tokenizer, length + opening, count, seed=seed)
        ]
        for task in tasks:
            for number, text in enumerate(texts):
                sample = make_sample(task, text, tokenizer, length, number=number, seed=seed, words=words)
                units.append(_unit(subject, sample))
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


def _unit(subject: Subject, sample: Any) -> Unit:
    def run() -> dict[str, Any]:
        texts = {variant: subject.answer(sample, variant) for variant in subject.variants}
        answers = {
            variant: {"found": sample.share_found(text), "text": text} for variant, text in texts.items()
        }
        return {"expected": list(sample.expected), "answers": answers}

    tokens = (len(sample.prompt_ids) + sample.answer_tokens) * len(subject.variants)
    return Unit(("ruler", sample.task, sample.length, sample.number), tokens, run)


def _accuracy(rows: Sequence[Mapping[str, Any]], variant: str) -> dict[str, Any]:
    right = _right(rows, variant)
    share = as_json(wilson_interval(sum(right), len(right)))
    return {"right": sum(right), "n": len(right), "share": share, "found": fmean(_found(rows, variant))}


def _difference(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    dense = _right(rows, "dense")
    gaps = [100 * (a - b) for a, b in zip(_found(rows, "dsa"), _found(rows, "dense"), strict=True)]
    return {
        **paired_points(_right(rows, "dsa"), dense),
        "found": as_json(mean_interval(gaps)),
        "dense_can": dense_can({"share": {"estimate": fmean(dense)}}),
    }


def _found(rows: Sequence[Mapping[str, Any]], variant: str) -> list[float]:
    return [row["answers"][variant]["found"] for row in rows]


def _right(rows: Sequence[Mapping[str, Any]], variant: str) -> list[bool]:
    return [found == 1 for found in _found(rows, variant)]
