"""Coarse scores: one small head, products of 8-bit integers."""

import torch
from torch import Tensor

from fulmen.ops.common.index_keys import codes_and_scales

# As many products of codes as surely add up exactly in float32: 127 * 127 * 1024 < 2 ** 24.
MOST_COARSE_DIMS = 1024


def coarse_scores(packed_q_TX: Tensor, packed_k_SX: Tensor) -> Tensor:
    """C[t, s] = (sum_n q[t, n] k[s, n]) (scale[t] scale[s]), of int8 codes and their scales; `[T, S]`.

    float32 holds the sum exactly in whatever order it is added, and the scales' product too, so that only the
    last product is rounded: one result, on every machine. What is not a number becomes infinity.
    """
    q_TN, q_scale_T1 = (part.float() for part in codes_and_scales(packed_q_TX))
    k_SN, k_scale_S1 = (part.float() for part in codes_and_scales(packed_k_SX))
    scores_TS = (q_TN @ k_SN.T) * (q_scale_T1 * k_scale_S1.T)
    return scores_TS.masked_fill_(scores_TS.isnan(), torch.inf)


def positions_of_chosen(chosen_TK: Tensor, candidates_TC: Tensor) -> Tensor:
    """`[T, K]`: the positions of those of the candidates that were chosen, -1 where nothing was."""
    positions_TK = candidates_TC.gather(-1, chosen_TK.clamp(min=0).long())
    return torch.where(chosen_TK < 0, -1, positions_TK).int()
