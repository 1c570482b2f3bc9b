"""Sequences as rows for Trainer: token ids, and positions that begin anew with each packed document."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fulmen.data import TokenSequence

# What torch's and Transformers' losses leave out.
NO_LABEL = -100

# Token ids of one document [T] int64, or a sequence that knows where its documents begin.
TokenIds = Tensor | TokenSequence


def sequence_row(sequence: TokenIds) -> dict[str, Tensor]:
    """input_ids and position_ids, int64 [T]."""
    if isinstance(sequence, Tensor):
        return {"input_ids": sequence, "position_ids": torch.arange(len(sequence))}
    return {"input_ids": sequence.input_ids, "position_ids": sequence.position_ids}


def sequence_rows(sequences: Sequence[TokenIds]) -> list[dict[str, Tensor]]:
    """`sequence_row` of each."""
    return [sequence_row(sequence) for sequence in sequences]


def next_tokens(input_ids_BT: Tensor, position_ids_BT: Tensor) -> Tensor:
    """labels_BT: the token after each one; NO_LABEL at the end of a row and of a document."""
    labels_BT = torch.full_like(input_ids_BT, NO_LABEL)
    goes_on = position_ids_BT[:, 1:] - position_ids_BT[:, :-1] == 1
    labels_BT[:, :-1] = torch.where(goes_on, input_ids_BT[:, 1:], NO_LABEL)
    return labels_BT
