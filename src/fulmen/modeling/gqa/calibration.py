"""How calibration texts are read: densely, some of them spread over the context; and where they are asked."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fulmen.errors import ConfigError
from fulmen.modeling.lengths import LENGTH_OVER_TOPK, context_of
from fulmen.modeling.rope_tables import are_rotated_alike
from fulmen.modeling.selectors import DenseSelector, dsa_attentions, use_selector

# Queries of a sequence that the thresholds are fitted on (hidden sizes want many), evenly over log t so
# that short pasts count too.
THRESHOLD_ROWS = 384
SHORTEST_SEQUENCE = 16
# Pieces of a text that stand apart where it is spread over the context, and how many times its length it then
# has at most: one that stands for much more asks for so small a k that what it tells is of no use near by.
SPREAD_PIECES, MOST_SPREAD = 4, 4


def spread_positions(n_texts: int, length: int, context: int) -> Tensor:
    """position_BT int64 of texts to calibrate on: the second, fourth ... in pieces with gaps between them,
    so that the last token stands near the end of the context, or at `MOST_SPREAD` times the length.

    Queries of their last piece have keys at all distances, near ones as in any text.
    """
    position_BT = torch.arange(length).repeat(n_texts, 1)
    gap = max(0, min(context, MOST_SPREAD * length) - length) // (SPREAD_PIECES - 1)
    position_BT[1::2] += gap * (torch.arange(length) * SPREAD_PIECES // length)
    return position_BT


def positions_to_read(model: PreTrainedModel, n_texts: int, length: int) -> Tensor:
    """position_BT, spread over the model's context unless its rotation depends on the length of a text."""
    context = context_of(model.config) or length
    return spread_positions(n_texts, length, context if are_rotated_alike(model, length, context) else length)


def read_at(model: PreTrainedModel, input_ids_BT: Tensor, position_BT: Tensor) -> Any:
    """What the model without its head gives for whole texts whose tokens stand at these positions."""
    # With a mask, a gap is no border between documents.
    return model.base_model(
        input_ids_BT,
        attention_mask=torch.ones_like(input_ids_BT),
        position_ids=position_BT.to(input_ids_BT.device),
        use_cache=False,
    )


def read_densely(
    model: PreTrainedModel, input_ids_BT: Tensor, fit: Callable[[Any, dict, Tensor], None]
) -> None:
    """A dense pass; `fit` is called before each converted layer, with it, what it is given, and position_BT.

    Raises ConfigError if the texts are too short.
    """
    length = input_ids_BT.shape[1]
    if length < SHORTEST_SEQUENCE:
        raise ConfigError(
            f"calibration length {length} is too short; use at least {SHORTEST_SEQUENCE} tokens"
        )
    position_BT = positions_to_read(model, *input_ids_BT.shape)

    def before(attention: Any, _: Any, kwargs: dict) -> None:
        fit(attention, kwargs, position_BT)

    hooks = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in dsa_attentions(model)]
    try:
        with use_selector(model, DenseSelector()):
            read_at(model, input_ids_BT, position_BT)
    finally:
        for hook in hooks:
            hook.remove()


def asked_queries(topk: float, position_T: Tensor) -> tuple[int, Tensor]:
    """What a query keeps of a text's tokens, and the queries rows_R to ask, evenly spread over log t.

    A text in pieces is a sample of the tokens up to its last position: its last piece is asked, and keeps as
    small a share. A shorter text has no boundary at k to learn: that of a smaller k is learned instead.
    """
    length, stands_for = len(position_T), int(position_T[-1]) + 1
    k = min(max(1, round(topk * length / stands_for)), length // LENGTH_OVER_TOPK)
    first = k if stands_for == length else length - length // SPREAD_PIECES
    points_R = (torch.arange(THRESHOLD_ROWS) + 0.5) / THRESHOLD_ROWS
    rows_R = (first * (length / first) ** points_R.double()).long()
    return k, rows_R.clamp(first, length - 1).unique()
