"""Texts as rows for Trainer: token ids, and positions that begin anew with each packed document."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fulmen.data import TokenSequence

# What torch's and Transformers' losses leave out.
NO_LABEL = -100

# A text: token ids of one document [T] int64, or a sequence, which knows where its documents begin.
TokenIds = Tensor | TokenSequence


def sequence_row(text: TokenIds) -> dict[str, Tensor]:
    """input_ids and position_ids, int64 [T]."""
    if isinstance(text, Tensor):
        return {"input_ids": text, "position_ids": torch.arange(len(text))}
    return {"input_ids": text.input_ids, "position_ids": text.position_ids}


def sequence_rows(texts: Sequence[TokenIds]) -> list[dict[str, Tensor]]:
    """`sequence_row` of each."""
    return [sequence_row(text) for text in texts]


def next_tokens(input_ids_BT: Tensor, position_ids_BT: Tensor) -> Tensor:
    """labels_BT: the token after each one; NO_LABEL at the end of a row and of a document."""
    labels_BT = torch.full_like(input_ids_BT, NO_LABEL)
    goes_on = position_ids_BT[:, 1:] - position_ids_BT[:, :-1] == 1
    labels_BT[:, :-1] = torch.where(goes_on, input_ids_BT[:, 1:], NO_LABEL)
    return labels_BT
