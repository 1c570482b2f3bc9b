"""The `generate` suite: greedy continuations of texts: how long DSA goes with dense, and repetition."""

from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import Any

from fulmen.data import Window
from fulmen.evaluation.greedy import common_start
from fulmen.evaluation.statistics import mean_interval
from fulmen.evaluation.suites.journal import Unit
from fulmen.evaluation.suites.paired import as_json
from fulmen.evaluation.suites.subjects import Subject

NEW_TOKENS = 64
GRAM = 4


def generation_units(
    subject: Subject, windows: Sequence[Window], length: int, new_tokens: int = NEW_TOKENS
) -> list[Unit]:
    """One unit per text: its first `length - new_tokens` tokens are the prompt."""
    return [_unit(subject, window, length, new_tokens, number) for number, window in enumerate(windows)]


def repeated_share(tokens: Sequence[int], gram: int = GRAM) -> float:
    """Share of the n-grams that have occurred before: 0 if all differ; 0 too if there is not even one."""
    grams = [tuple(tokens[place : place + gram]) for place in range(len(tokens) - gram + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def generation_tables(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Per length and variant: tokens until it leaves dense's text, and repeated 4-grams beside dense's."""
    rows = []
    for length in dict.fromkeys(record["length"] for record in records):
        of_length = [record for record in records if record["length"] == length]
        for variant in of_length[0]["tokens"]:
            agreed = [record["agreed"][variant] for record in of_length]
            own = [record["repeated"][variant] for record in of_length]
            gaps = [record["repeated"][variant] - record["repeated"]["dense"] for record in of_length]
            rows.append(
                {
                    "length": length,
                    "variant": variant,
                    "texts": len(of_length),
                    "agreed_median": median(agreed),
                    "agreed_to_the_end": sum(record["whole"][variant] for record in of_length),
                    "repeated": fmean(own),
                    "repeated_minus_dense": as_json(mean_interval(gaps)),
                }
            )
    return {"new_tokens": NEW_TOKENS, "rows": rows}


def _unit(subject: Subject, window: Window, length: int, new_tokens: int, number: int) -> Unit:
    prompt_ids = window.input_ids[: length - new_tokens]
    variants = [name for name in subject.variants if name in ("dense", "dsa")]

    def run() -> dict[str, Any]:
        tokens = {name: subject.continue_text(prompt_ids, new_tokens, name) for name in variants}
        agreed = {name: common_start(written, tokens["dense"]) for name, written in tokens.items()}
        return {
            "name": window.name,
            "tokens": tokens,
            "agreed": agreed,
            "whole": {name: agreed[name] == len(tokens["dense"]) for name in tokens},
            "repeated": {name: repeated_share(written) for name, written in tokens.items()},
        }

    return Unit(("generate", window.kind, length, number), length * len(variants), run)
