"""What the two levels of a selection share: the coarse level is an indexer, too, of one key head."""

import torch
from torch import Tensor


def as_indexer(coarse_q_BTMN: Tensor, packed_BSX: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Coarse queries, keys `[B, S, 1, X]` and weights, all 1, as `fulmen.ops.scores` takes an indexer's."""
    return coarse_q_BTMN, packed_BSX[:, :, None], torch.ones_like(coarse_q_BTMN[..., 0])


def most_for_nan(scores: Tensor) -> Tensor:
    """In place: a coarse score that is not a number becomes infinity, so that the indexer decides."""
    return scores.masked_fill_(scores.isnan(), torch.inf)


def positions_of_chosen(chosen_TK: Tensor, candidates_TC: Tensor) -> Tensor:
    """`[T, K]`: the positions of those of the candidates that were chosen, -1 where nothing was."""
    positions_TK = candidates_TC.gather(-1, chosen_TK.clamp(min=0).long())
    return torch.where(chosen_TK < 0, -1, positions_TK).int()
