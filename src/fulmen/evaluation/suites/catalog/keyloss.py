"""The `keyloss` suite: loss on the tokens that need the long context, beside the plain loss.

Most tokens are foretold by the sentence they are in, so the plain loss hardly sees what is lost far away. Key
tokens are those that the long context helps much, and that are then foretold well: LongPPL's criterion
(arXiv 2410.23771, section 3), with the dense model as the judge.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fulmen.data import Document, TokenSequence, draw_sequences
from fulmen.evaluation.journal import Unit
from fulmen.evaluation.statistics import interval_row
from fulmen.evaluation.style import VARIANT_LABELS
from fulmen.evaluation.suites.losses import require_plain_head
from fulmen.evaluation.suites.paired import bootstrap_ratio_interval
from fulmen.evaluation.suites.responders import LocalResponder
from fulmen.evaluation.suites.suite import Record, Rows, Section, Suite, SuiteSizes, Tables
from fulmen.evaluation.wording import interval_text

# The paper's thresholds: the log-probability gains more than 2 nats, and is above -2 with the long context.
GAIN, LONG_LOG_PROB = 2.0, -2.0
# The short context is this part of the long one, at most twice as much.
SHORT_PART = 16
SHORTEST_CONTEXT = 32
KINDS = ("plain", "key")


def keyloss_units(responder: LocalResponder, sequences: Sequence[TokenSequence]) -> list[Unit]:
    """One unit per text.

    Raises UnsupportedModelError for a model whose logits are not its last layer's.
    """
    require_plain_head(responder.model)
    return [_unit(responder, sequence, number) for number, sequence in enumerate(sequences)]


def key_tokens(long_loss_P: Tensor, short_loss_P: Tensor) -> Tensor:
    """bool_P: the tokens that need the long context, by the losses with the long and a short one."""
    return (short_loss_P - long_loss_P > GAIN) & (-long_loss_P > LONG_LOG_PROB)


def short_context_losses(responder: LocalResponder, ids_T: Tensor, short: int) -> Tensor:
    """loss_P of the dense model that sees between `short` and `2 * short` tokens; the first ones see all.

    The text is read in pieces of `2 * short` that overlap by half; each piece scores its second half.
    """
    losses = []
    for start in range(0, len(ids_T) - 1, short):
        piece_T = ids_T[max(start - short, 0) : start + short + 1]
        loss_P = responder.losses(piece_T, "dense")
        losses.append(loss_P[min(start, short) :])
    return torch.cat(losses)


def short_context(length: int) -> int:
    """Tokens of the short context for texts of `length`."""
    return min(max(length // SHORT_PART, SHORTEST_CONTEXT), max(length // 2, 1))


def keyloss_tables(records: Sequence[Mapping[str, Any]], seed: int = 0) -> dict[str, Any]:
    """Per length and kind of tokens: how many there are, each variant's loss, and loss / dense - 1.

    The intervals are bootstrapped over texts. A kind without tokens has no losses.
    """
    rows = []
    for length in dict.fromkeys(record["length"] for record in records):
        of_length = [record for record in records if record["length"] == length]
        for kind in KINDS:
            tokens = sum(record["tokens"][kind] for record in of_length)
            row = {"length": length, "kind": kind, "texts": len(of_length), "tokens": tokens}
            losses = {name: _loss(of_length, name, kind, seed) for name in of_length[0]["losses"]}
            rows.append({**row, "losses": losses if tokens else {}})
    return {"rows": rows, "gain": GAIN, "long_log_prob": LONG_LOG_PROB}


def _loss(records: Sequence[Mapping[str, Any]], variant: str, kind: str, seed: int) -> dict[str, Any]:
    own = [record["losses"][variant][kind] for record in records]
    dense = [record["losses"]["dense"][kind] for record in records]
    tokens = sum(record["tokens"][kind] for record in records)
    if not sum(dense):
        return {}
    ratio = bootstrap_ratio_interval(own, dense, seed=seed)
    over = type(ratio)(*(value - 1 for value in ratio))
    return {"loss": sum(own) / tokens, "over_dense": interval_row(over)}


def _unit(responder: LocalResponder, sequence: TokenSequence, number: int) -> Unit:
    ids_T = sequence.input_ids
    length = len(ids_T)
    short = short_context(length)

    def run() -> dict[str, Any]:
        losses = {name: responder.losses(ids_T, name) for name in responder.variants}
        key_P = key_tokens(losses["dense"], short_context_losses(responder, ids_T, short))
        # The first tokens have no long context, so they are in neither kind.
        late_P = torch.arange(length - 1) >= length // 2
        chosen = {"plain": late_P, "key": late_P & key_P}
        return {
            "name": sequence.name,
            "short": short,
            "tokens": {kind: int(places_P.sum()) for kind, places_P in chosen.items()},
            "losses": {
                name: {kind: loss_P[places_P].double().sum().item() for kind, places_P in chosen.items()}
                for name, loss_P in losses.items()
            },
        }

    return Unit(("keyloss", sequence.kind, length, number), length * (len(responder.variants) + 2), run)


def _section(tables: Mapping[str, Any]) -> Section:
    names = list(next((row["losses"] for row in tables["rows"] if row["losses"]), {"dense": {}}))
    others = [name for name in names if name != "dense"]
    rows: Rows = [
        (
            "length",
            "tokens",
            "texts",
            "number",
            "dense",
            *(f"{VARIANT_LABELS[name]}, over dense" for name in others),
        )
    ]
    for row in tables["rows"]:
        losses = row["losses"]
        dense = f"{losses['dense']['loss']:.4f}" if losses.get("dense") else "none"
        over = [interval_text(losses[name]["over_dense"]) if losses.get(name) else "" for name in others]
        rows.append((str(row["length"]), row["kind"], str(row["texts"]), str(row["tokens"]), dense, *over))
    note = (
        f"Loss in nats over the second half of each text. Key tokens gain more than {tables['gain']:g} nats "
        f"from the long context and are above {tables['long_log_prob']:g} with it, as the dense model "
        "judges. Intervals are bootstrapped over texts."
    )
    return Section("Loss on key tokens", (note,), rows)


class KeyLoss(Suite):
    """Loss on key tokens."""

    name, order = "keyloss", 1
    needs_weights = True

    def units(
        self, responder: Any, tokenizer: Any, documents: Sequence[Document], sizes: SuiteSizes
    ) -> list[Unit]:
        texts = (
            draw_sequences(documents, tokenizer, length, sizes.samples, seed=sizes.seed)
            for length in sizes.lengths
        )
        return [unit for drawn in texts for unit in keyloss_units(responder, drawn)]

    def tables(self, records: Sequence[Record], *, topk: int | None, seed: int) -> Tables:
        return keyloss_tables(records, seed)

    def section(self, tables: Tables) -> Section:
        return _section(tables)


SUITE = KeyLoss()
