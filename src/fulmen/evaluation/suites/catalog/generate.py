"""The `generate` suite: greedy continuations of texts: how long DSA goes with dense, and repetition."""

from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import Any

from fulmen.data import Document, TokenSequence, draw_sequences
from fulmen.data.sequences import common_start
from fulmen.errors import ConfigError
from fulmen.evaluation.journal import Unit
from fulmen.evaluation.statistics import interval_row, mean_interval
from fulmen.evaluation.style import VARIANT_LABELS
from fulmen.evaluation.suites.responders import Responder
from fulmen.evaluation.suites.suite import Record, Rows, Section, Suite, SuiteSizes, Tables
from fulmen.evaluation.wording import interval_text, percent

NEW_TOKENS = 64
GRAM = 4


def generation_units(
    responder: Responder, sequences: Sequence[TokenSequence], length: int, new_tokens: int = NEW_TOKENS
) -> list[Unit]:
    """One unit per text: its first `length - new_tokens` tokens are the prompt.

    Raises ConfigError if there are none.
    """
    if length <= new_tokens:
        raise ConfigError(
            f"length={length} leaves no prompt before the {new_tokens} tokens of generate; use more",
            arguments=["lengths"],
        )
    return [
        _unit(responder, sequence, length, new_tokens, number) for number, sequence in enumerate(sequences)
    ]


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
                    "repeated_minus_dense": interval_row(mean_interval(gaps)),
                }
            )
    return {"new_tokens": NEW_TOKENS, "rows": rows}


def _unit(responder: Responder, sequence: TokenSequence, length: int, new_tokens: int, number: int) -> Unit:
    prompt_ids = sequence.input_ids[: length - new_tokens]
    variants = [name for name in responder.variants if name in ("dense", "dsa")]

    def run() -> dict[str, Any]:
        tokens = {name: responder.continue_text(prompt_ids, new_tokens, name) for name in variants}
        agreed = {name: common_start(written, tokens["dense"]) for name, written in tokens.items()}
        return {
            "name": sequence.name,
            "tokens": tokens,
            "agreed": agreed,
            "whole": {name: agreed[name] == len(tokens["dense"]) for name in tokens},
            "repeated": {name: repeated_share(written) for name, written in tokens.items()},
        }

    return Unit(("generate", sequence.kind, length, number), length * len(variants), run)


def _section(tables: Mapping[str, Any]) -> Section:
    rows: Rows = [
        ("length", "variant", "same tokens as dense (median)", "all the same", "repeated 4-grams", "− dense")
    ]
    for row in tables["rows"]:
        is_dense = row["variant"] == "dense"
        rows.append(
            (
                str(row["length"]),
                VARIANT_LABELS[row["variant"]],
                "" if is_dense else f"{row['agreed_median']:g}",
                "" if is_dense else f"{row['agreed_to_the_end']} of {row['texts']}",
                percent(row["repeated"], 1),
                "" if is_dense else interval_text(row["repeated_minus_dense"], 1),
            )
        )
    note = f"Greedy continuations of {tables['new_tokens']} tokens; one difference changes the rest."
    return Section("Generation", (note,), rows)


class Generate(Suite):
    """Greedy continuations."""

    name, order = "generate", 3

    def units(
        self, responder: Any, tokenizer: Any, documents: Sequence[Document], sizes: SuiteSizes
    ) -> list[Unit]:
        return [
            unit
            for length in sizes.lengths
            for unit in generation_units(
                responder,
                draw_sequences(documents, tokenizer, length, sizes.samples, seed=sizes.seed),
                length,
            )
        ]

    def tables(self, records: Sequence[Record], *, topk: int | None, seed: int) -> Tables:
        return generation_tables(records)

    def section(self, tables: Tables) -> Section:
        return _section(tables)


SUITE = Generate()
