"""Look-ups counted: right answers, those lost and gained against dense, and what took them."""

from collections.abc import Mapping, Sequence
from typing import Any

from fulmen.evaluation.parity.lookups import LookupPlan
from fulmen.evaluation.parity.results import AnswerSplit, LookupDifference, LookupRow, LookupTables
from fulmen.evaluation.statistics import (
    Interval,
    clustered_difference_interval,
    interval_row,
    wilson_interval,
)

# Right or wrong, by text and question.
Answers = dict[int, list[bool]]


def lookup_tables(plan: LookupPlan, records: Sequence[Mapping[str, Any]]) -> LookupTables:
    """Per variant and k the right answers; per k DSA against dense, question by question.

    Args:
        records: of `lookup_units`.
    """
    answers: dict[tuple[str, int], Answers] = {}
    for record in records:
        answers.setdefault((record["variant"], record["k"]), {})[record["text"]] = record["right"]
    dense = answers["dense", plan.length]
    rows = [_row(variant, k, found, dense) for (variant, k), found in answers.items()]
    return {
        "length": plan.length,
        "n_keys": max(len(text.lookups) for text in plan.texts),
        "texts": len(plan.texts),
        "is_chat": bool(plan.tokenizer.chat_template),
        "rows": rows,
        "differences": [_difference(answers, dense, k) for k in sorted(plan.ks, reverse=True)],
    }


def _row(variant: str, k: int, found: Answers, dense: Answers) -> LookupRow:
    """Right answers about the texts that were read, and dense's about the same ones."""
    right = [one for text in found.values() for one in text]
    return {
        "variant": variant,
        "k": k,
        "right": sum(right),
        "n": len(right),
        "share": interval_row(wilson_interval(sum(right), len(right))),
        "texts": len(found),
        "dense_right": sum(sum(dense[text]) for text in found),
    }


def _difference(answers: Mapping[tuple[str, int], Answers], dense: Answers, k: int) -> LookupDifference:
    dsa = answers["dsa", k]
    pairs = [(text, one, other) for text in dense for one, other in zip(dsa[text], dense[text], strict=True)]
    texts, of_dsa, of_dense = zip(*pairs, strict=True)
    interval = clustered_difference_interval(of_dsa, of_dense, texts)
    return {
        "k": k,
        "n": len(pairs),
        "texts": len(dense),
        "lost": sum(other and not one for _, one, other in pairs),
        "gained": sum(one and not other for _, one, other in pairs),
        "dsa_minus_dense": interval_row(Interval(*(100 * value for value in interval))),
        "split": _split(answers, dense, k, len(pairs)),
    }


def _split(answers: Mapping[tuple[str, int], Answers], dense: Answers, k: int, n: int) -> AnswerSplit:
    """In points: what the oracle loses, what the index does beyond it, the split of k beyond that, and the
    coarse level, where it was asked, beyond that.
    """

    def right(found: Answers) -> int:
        return sum(sum(text) for text in found.values())

    oracle, dsa = (right(answers[name, k]) for name in ("oracle", "dsa"))
    one = right(answers["one_level", k]) if ("one_level", k) in answers else dsa
    equal = right(answers["dsa_equal", k]) if ("dsa_equal", k) in answers else one
    budget, index, split = oracle - right(dense), equal - oracle, one - equal
    found: AnswerSplit = {
        "budget": 100 * budget / n,
        "index": 100 * index / n,
        "split_of_k": 100 * split / n,
    }
    if ("one_level", k) in answers:
        found["coarse"] = 100 * (dsa - one) / n
    return found
