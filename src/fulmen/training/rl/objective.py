"""What reinforcement learning maximizes: GRPO with the four changes of DeepSeek-V3.2 (arXiv 2512.02556, 3.1).

Every function is the reference of its formula, in plain torch. Axes: B replies, T tokens of a reply, N tokens
of many replies, K tokens that sampling kept, G replies to one prompt, C hidden dims, V vocabulary. All
log-probabilities are natural; those of engine, policy and reference are over the same kept tokens.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class GrpoLoss(NamedTuple):
    """The loss, a scalar, and what it was made of, for a log.

    Attributes:
        kl_BT: `unbiased_kl`, without its strength. ratio_BT: policy over engine.
        keeps_B: `off_policy_keeps`.
    """

    loss: Tensor
    kl_BT: Tensor
    ratio_BT: Tensor
    keeps_B: Tensor


def group_advantages(rewards_PG: Tensor) -> Tensor:
    """Each reply's reward above its group's mean, not divided by the deviation; 0 where the reward is NaN.

    Args:
        rewards_PG: float [prompts, G]; NaN has no part in a mean.
    """
    return torch.nan_to_num(rewards_PG - rewards_PG.nanmean(-1, keepdim=True), nan=0.0)


def clipped_surrogate(ratio_BT: Tensor, advantage_B: Tensor, low: float, high: float) -> Tensor:
    """min(r A, clip(r, 1 - low, 1 + high) A), float [B, T] (PPO, arXiv 1707.06347, eq. 7)."""
    advantage_B1 = advantage_B[:, None]
    return torch.minimum(ratio_BT * advantage_B1, ratio_BT.clamp(1 - low, 1 + high) * advantage_B1)


def unbiased_kl(logp_BT: Tensor, reference_BT: Tensor, engine_BT: Tensor) -> Tensor:
    """r (u - log u - 1) with u = reference / policy and r = policy / engine, float [B, T] (V3.2, eq. 7).

    Over tokens that the engine sampled, its mean is KL(policy || reference), and its gradient's mean is that
    KL's gradient: r carries the gradient too, and is against who sampled, not a recomputed policy.
    """
    log_u_BT = reference_BT - logp_BT
    return (logp_BT - engine_BT).exp() * (log_u_BT.exp() - log_u_BT - 1)


def off_policy_keeps(
    advantage_B: Tensor, logp_BT: Tensor, engine_BT: Tensor, counts_BT: Tensor, threshold: float
) -> Tensor:
    """Which replies stay in the policy's term, bool [B] (V3.2, eq. 9).

    One that was worse than its group leaves if the policy has moved away from it: if the mean over its tokens
    of log(engine / policy) exceeds the threshold (nats).
    """
    return (advantage_B >= 0) | (token_mean(engine_BT - logp_BT.detach(), counts_BT) <= threshold)


def token_mean(x_BT: Tensor, counts_BT: Tensor) -> Tensor:
    """Mean of each row over the tokens that count, [B]; 0 where none does."""
    return torch.where(counts_BT, x_BT, 0).sum(-1) / counts_BT.sum(-1).clamp(min=1)


def grpo_loss(
    logp_BT: Tensor,
    engine_BT: Tensor,
    reference_BT: Tensor,
    advantage_B: Tensor,
    counts_BT: Tensor,
    kl_B: Tensor,
    clip: tuple[float, float],
    off_policy: float,
) -> GrpoLoss:
    """What is minimized: the mean over replies of the mean over their tokens (V3.2, eq. 5).

    Args:
        counts_BT: bool, where a reply has a token.
        kl_B: strength of the KL, each reply that of its domain.
        clip: how far below and above 1 the ratio has a gradient.
        off_policy: threshold of `off_policy_keeps`, which the KL is not subject to.
    """
    # Padding has arbitrary numbers, whose exponential may overflow.
    logp_BT, engine_BT, reference_BT = (
        torch.where(counts_BT, x_BT, 0) for x_BT in (logp_BT, engine_BT, reference_BT)
    )
    ratio_BT = (logp_BT - engine_BT).exp()
    keeps_B = off_policy_keeps(advantage_B, logp_BT, engine_BT, counts_BT, off_policy)
    gain_BT = clipped_surrogate(ratio_BT, advantage_B, *clip) * keeps_B[:, None]
    kl_BT = unbiased_kl(logp_BT, reference_BT, engine_BT)
    loss = token_mean(kl_B[:, None] * kl_BT - gain_BT, counts_BT).mean()
    return GrpoLoss(loss, kl_BT.detach(), ratio_BT.detach(), keeps_B)
