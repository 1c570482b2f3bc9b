"""The `keyloss` suite: loss on the tokens that need the long context, beside the plain loss.

Most tokens are foretold by the sentence they are in, so the plain loss hardly sees what is lost far away. Key
tokens are those that the long context helps much, and that are then foretold well: LongPPL's criterion
(arXiv 2410.23771, section 3), with the dense model as the judge.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fulmen.data import Window
from fulmen.evaluation.suites.journal import Unit
from fulmen.evaluation.suites.losses import require_plain_head
from fulmen.evaluation.suites.paired import as_json, bootstrap_ratio_interval
from fulmen.evaluation.suites.subjects import LocalSubject

# The paper's thresholds: the log-probability gains more than 2 nats, and is above -2 with the long context.
GAIN, LONG_LOG_PROB = 2.0, -2.0
# The short context is this part of the long one, at most twice as much.
SHORT_PART = 16
SHORTEST_CONTEXT = 32
KINDS = ("plain", "key")


def keyloss_units(subject: LocalSubject, windows: Sequence[Window]) -> list[Unit]:
    """One unit per text.

    Raises UnsupportedModelError for a model whose logits are not its last layer's.
    """
    require_plain_head(subject.model)
    return [_unit(subject, window, number) for number, window in enumerate(windows)]


def key_tokens(long_loss_P: Tensor, short_loss_P: Tensor) -> Tensor:
    """bool_P: the tokens that need the long context, by the losses with the long and a short one."""
    return (short_loss_P - long_loss_P > GAIN) & (-long_loss_P > LONG_LOG_PROB)


def short_context_losses(subject: LocalSubject, ids_T: Tensor, short: int) -> Tensor:
    """loss_P of the dense model that sees between `short` and `2 * short` tokens; the first ones see all.

    The text is read in pieces of `2 * short` that overlap by half; each piece scores its second half.
    """
    losses = []
    for start in range(0, len(ids_T) - 1, short):
        piece_T = ids_T[max(start - short, 0) : start + short + 1]
        loss_P = subject.losses(piece_T, "dense")
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
    return {"loss": sum(own) / tokens, "over_dense": as_json(over)}


def _unit(subject: LocalSubject, window: Window, number: int) -> Unit:
    ids_T = window.input_ids
    length = len(ids_T)
    short = short_context(length)

    def run() -> dict[str, Any]:
        losses = {name: subject.losses(ids_T, name) for name in subject.variants}
        key_P = key_tokens(losses["dense"], short_context_losses(subject, ids_T, short))
        # The first tokens have no long context, so they are in neither kind.
        late_P = torch.arange(length - 1) >= length // 2
        chosen = {"plain": late_P, "key": late_P & key_P}
        return {
            "name": window.name,
            "short": short,
            "tokens": {kind: int(places_P.sum()) for kind, places_P in chosen.items()},
            "losses": {
                name: {kind: loss_P[places_P].double().sum().item() for kind, places_P in chosen.items()}
                for name, loss_P in losses.items()
            },
        }

    return Unit(("keyloss", window.kind, length, number), length * (len(subject.variants) + 2), run)
