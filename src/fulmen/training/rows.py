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


def before_answers(answers: Sequence[tuple[int, int]]) -> Tensor:
    """Ascending positions of the tokens that predict those of answers, which begin and stop there."""
    spans = [torch.arange(start - 1, stop - 1) for start, stop in answers]
    return torch.cat([torch.zeros(0, dtype=torch.int64), *spans]).unique()


def sequence_rows(sequences: Sequence[TokenIds]) -> list[dict[str, Tensor]]:
    """`sequence_row` of each."""
    return [sequence_row(sequence) for sequence in sequences]


def next_tokens(input_ids_BT: Tensor, position_ids_BT: Tensor) -> Tensor:
    """labels_BT: the token after each one; NO_LABEL at the end of a row and of a document."""
    labels_BT = torch.full_like(input_ids_BT, NO_LABEL)
    goes_on = position_ids_BT[:, 1:] - position_ids_BT[:, :-1] == 1
    labels_BT[:, :-1] = torch.where(goes_on, input_ids_BT[:, 1:], NO_LABEL)
    return labels_BT


def target_row(sequence: TokenIds, n_targets: int | None = None) -> dict[str, Tensor]:
    """`sequence_row` with answers and targets, bool [T]: where the next token is an answer's, and where its
    loss is taken.

    That is at all answers, and at `n_targets` of the other tokens, evenly spread (None: at all): logits of a
    large vocabulary cost as much as the layers, and neighbours teach alike.
    """
    row = sequence_row(sequence)
    answers_T = torch.zeros(len(row["input_ids"]), dtype=torch.bool)
    if not isinstance(sequence, Tensor):
        answers_T[before_answers(sequence.answers)] = True
    return with_targets({**row, "answers": answers_T}, n_targets)


def with_targets(row: dict[str, Tensor], n_targets: int | None) -> dict[str, Tensor]:
    """`target_row`, of its other fields alone."""
    has_label_T = next_tokens(row["input_ids"][None], row["position_ids"][None])[0] != NO_LABEL
    answers_T = row["answers"] & has_label_T
    others = (has_label_T & ~answers_T).nonzero()[:, 0]
    if n_targets is not None and len(others) > n_targets:
        others = others[((torch.arange(n_targets) + 0.5) * len(others) / n_targets).long()]
    targets_T = answers_T.clone()
    targets_T[others] = True
    kept = {name: row[name] for name in ("input_ids", "position_ids")}
    return {**kept, "answers": answers_T, "targets": targets_T}


def target_rows(sequences: Sequence[TokenIds], n_targets: int | None = None) -> list[dict[str, Tensor]]:
    """`target_row` of each."""
    return [target_row(sequence, n_targets) for sequence in sequences]
