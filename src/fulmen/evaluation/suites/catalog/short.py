"""The `short` suite: up to k tokens DSA must be the dense model exactly; a little above it, almost."""

from collections.abc import Mapping, Sequence
from typing import Any

from fulmen.data import Document, TokenSequence, draw_sequences
from fulmen.evaluation.journal import Unit
from fulmen.evaluation.statistics import interval_row, mean_interval
from fulmen.evaluation.suites.losses import largest_logit_gap, token_losses
from fulmen.evaluation.suites.responders import LocalResponder
from fulmen.evaluation.suites.suite import Record, Rows, Section, Suite, SuiteSizes, Tables
from fulmen.evaluation.wording import nats_text

SHORTEST = 128


def short_lengths(topk: int, context: int | None) -> list[int]:
    """Lengths below, at and above k, within the model's context."""
    wanted = {min(SHORTEST, topk), max(topk // 2, 1), topk, topk + 1, topk + max(topk // 4, 1), 2 * topk}
    return sorted(length for length in wanted if length > 1 and (context is None or length <= context))


def short_units(
    responder: LocalResponder, sequences: Sequence[TokenSequence], lengths: Sequence[int]
) -> list[Unit]:
    """One unit per text and length: beginnings of `sequences`, which are as long as the longest length."""
    return [
        _unit(responder, sequence, length, number)
        for length in lengths
        for number, sequence in enumerate(sequences)
    ]


def short_tables(records: Sequence[Mapping[str, Any]], topk: int) -> dict[str, Any]:
    """Per length: the largest difference of a logit, the texts with any, and the mean difference of loss."""
    rows = []
    for length in dict.fromkeys(record["length"] for record in records):
        of_length = [record for record in records if record["length"] == length]
        rows.append(
            {
                "length": length,
                "must_be_equal": length <= topk,
                "texts": len(of_length),
                "unequal": sum(record["max_difference"] > 0 for record in of_length),
                "max_difference": max(record["max_difference"] for record in of_length),
                "loss_difference": interval_row(
                    mean_interval([record["dsa_minus_dense"] for record in of_length])
                ),
            }
        )
    return {"topk": topk, "rows": rows}


def _unit(responder: LocalResponder, sequence: TokenSequence, length: int, number: int) -> Unit:
    ids_T, head = sequence.input_ids[:length], responder.model.get_output_embeddings()

    def run() -> dict[str, Any]:
        hidden = {variant: responder.hidden(ids_T, variant) for variant in ("dense", "dsa")}
        loss = {name: token_losses(x_TC, head, ids_T).mean().item() for name, x_TC in hidden.items()}
        return {
            "name": sequence.name,
            "max_difference": largest_logit_gap(hidden["dsa"], hidden["dense"], head),
            "dense_loss": loss["dense"],
            "dsa_minus_dense": loss["dsa"] - loss["dense"],
        }

    return Unit(("short", sequence.kind, length, number), 2 * length, run)


def _section(tables: Mapping[str, Any]) -> Section:
    rows: Rows = [("length", "must equal dense", "unequal texts", "largest logit gap", "loss − dense, nats")]
    for row in tables["rows"]:
        rows.append(
            (
                str(row["length"]),
                "yes" if row["must_be_equal"] else "no",
                f"{row['unequal']} of {row['texts']}",
                f"{row['max_difference']:.2g}",
                nats_text(row["loss_difference"]),
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


class Short(Suite):
    """Short texts."""

    name, order = "short", 2
    needs_dsa = needs_weights = True

    def units(
        self, responder: Any, tokenizer: Any, documents: Sequence[Document], sizes: SuiteSizes
    ) -> list[Unit]:
        lengths = short_lengths(responder.topk, responder.context)
        drawn = draw_sequences(documents, tokenizer, lengths[-1], sizes.samples, seed=sizes.seed)
        return short_units(responder, drawn, lengths)

    def tables(self, records: Sequence[Record], *, topk: int | None, seed: int) -> Tables:
        assert topk is not None
        return short_tables(records, topk)

    def section(self, tables: Tables) -> Section:
        return _section(tables)


SUITE = Short()
