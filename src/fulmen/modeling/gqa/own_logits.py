"""A model's own attention logits at some of its queries."""

import torch
from torch import Tensor

from fulmen.ops.common.precision import cap_logits

# Scale, softcap and sinks_H of an attention.
Softmax = tuple[float, float | None, Tensor | None]
# exp of it is nothing beside 1, yet far from the denormal numbers, which take CPUs ten times as long.
LEAST_EXPONENT = -50.0
# exp of it is finite in float32, and so large that a sink leaves next to nothing.
LARGEST_EXPONENT = 80.0


def own_logits(
    q_THD: Tensor, k_SGD: Tensor, rows_R: Tensor, scale: float, softcap: float | None = None
) -> Tensor:
    """The model's own logits_HRS of ascending queries, -inf at later keys; S ends with the last query."""
    k_GSD = k_SGD[: int(rows_R[-1]) + 1].transpose(0, 1)
    return hide_later(grouped_logits(q_THD[rows_R] * scale, k_GSD, softcap), rows_R)


def grouped_logits(q_RHD: Tensor, k_GSD: Tensor, softcap: float | None = None) -> Tensor:
    """q . k, capped, as logits_HRS, later keys included; head h reads key head h // (H // G)."""
    q_GND = q_RHD.unflatten(1, (len(k_GSD), -1)).permute(1, 2, 0, 3).flatten(1, 2)
    logits_GNS = cap_logits(torch.bmm(q_GND, k_GSD.mT), softcap)
    return logits_GNS.unflatten(1, (-1, len(q_RHD))).flatten(0, 1)


def hide_later(logits_HRS: Tensor, rows_R: Tensor) -> Tensor:
    """In place: -inf at the keys after each of some ascending queries; S ends with the last of them."""
    # What the first query sees all of them see; and adding is several times as fast as filling by a mask.
    seen = int(rows_R[0]) + 1
    later_RS = later_keys(rows_R)[:, seen:]
    logits_HRS[..., seen:] += logits_HRS.new_zeros(later_RS.shape).masked_fill_(later_RS, -torch.inf)
    return logits_HRS


def later_keys(rows_R: Tensor) -> Tensor:
    """bool [R, S]: keys after each query; S ends with the last row."""
    return torch.arange(int(rows_R[-1]) + 1, device=rows_R.device) > rows_R[:, None]


def quick_exp_(x: Tensor) -> Tensor:
    """In place: exp(max(x, LEAST_EXPONENT)), for sums that hold a term near 1."""
    return x.clamp_min_(LEAST_EXPONENT).exp_()


def uncapped(logits: Tensor, softcap: float | None) -> Tensor:
    """The inverse of `cap_logits`; what lies beyond the cap is taken for 99 % of it."""
    return logits if softcap is None else torch.atanh((logits / softcap).clamp(-0.99, 0.99)) * softcap


def mean_attention_of(logits_HRS: Tensor, sinks_H: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """prob_RS, the mean over heads, and norm_HR: head h's share of it is exp(logit - norm) / H.

    So norm is the logsumexp of each head, its sink included. What sinks leave to the keys is taken as one
    distribution over these, as `mean_attention` has it. The logits are overwritten.
    """
    most_HR1 = logits_HRS.amax(-1, keepdim=True)
    power_HRS = quick_exp_(logits_HRS.sub_(most_HR1))
    sum_HR1 = power_HRS.sum(-1, keepdim=True)
    if sinks_H is not None:
        above_HR1 = sinks_H[:, None, None] - most_HR1
        keys_HR1, sum_HR1 = sum_HR1, sum_HR1 + above_HR1.clamp_max(LARGEST_EXPONENT).exp()
        sum_HR1 = sum_HR1 * (keys_HR1 / sum_HR1).mean(0)
    prob_R1S = torch.bmm((1 / sum_HR1 / len(sum_HR1)).permute(1, 2, 0), power_HRS.transpose(0, 1))
    return prob_R1S[:, 0], (most_HR1 + sum_HR1.log())[..., 0]
