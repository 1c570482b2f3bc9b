"""The `short` suite: up to k tokens DSA must be the dense model exactly; a little above it, almost."""

from collections.abc import Mapping, Sequence
from typing import Any

from fulmen.data import Window
from fulmen.evaluation.statistics import mean_interval
from fulmen.evaluation.suites.journal import Unit
from fulmen.evaluation.suites.losses import largest_logit_gap, token_losses
from fulmen.evaluation.suites.paired import as_json
from fulmen.evaluation.suites.subjects import LocalSubject

SHORTEST = 128


def short_lengths(topk: int, context: int | None) -> list[int]:
    """Lengths below, at and above k, within the model's context."""
    wanted = {min(SHORTEST, topk), max(topk // 2, 1), topk, topk + 1, topk + max(topk // 4, 1), 2 * topk}
    return sorted(length for length in wanted if length > 1 and (context is None or length <= context))


def short_units(subject: LocalSubject, windows: Sequence[Window], lengths: Sequence[int]) -> list[Unit]:
    """One unit per text and length: the beginnings of `windows`, which are as long as the longest length."""
    return [
        _unit(subject, window, length, number) for length in lengths for number, window in enumerate(windows)
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
                "loss_difference": as_json(
                    mean_interval([record["dsa_minus_dense"] for record in of_length])
                ),
            }
        )
    return {"topk": topk, "rows": rows}


def _unit(subject: LocalSubject, window: Window, length: int, number: int) -> Unit:
    ids_T, head = window.input_ids[:length], subject.model.get_output_embeddings()

    def run() -> dict[str, Any]:
        hidden = {variant: subject.hidden(ids_T, variant) for variant in ("dense", "dsa")}
        loss = {name: token_losses(x_TC, head, ids_T).mean().item() for name, x_TC in hidden.items()}
        return {
            "name": window.name,
            "max_difference": largest_logit_gap(hidden["dsa"], hidden["dense"], head),
            "dense_loss": loss["dense"],
            "dsa_minus_dense": loss["dsa"] - loss["dense"],
        }

    return Unit(("short", window.kind, length, number), 2 * length, run)
