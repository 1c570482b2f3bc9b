"""Next-token loss and distillation from hidden states, in chunks: logits of a full sequence never exist.

A teacher's distribution is kept as its n likeliest tokens and one bucket for all others. With p the teacher
and q the student, X the n tokens:

    KL = sum_{x in X} p(x) log (p(x) / q(x)) + p(rest) log (p(rest) / q(rest))

the exact divergence of the two distributions after all other tokens are merged: never above the full KL, and
0 only where the student has the teacher's n probabilities. Dropping the rest and renormalising instead would
reward a student that moves mass out of X.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Rows of logits alive at a time: 512 x 49,152 tokens in float32 are 100 MB.
LOGITS_ROWS = 512
# Below this a student's mass outside X counts as this much; float32 has nothing near it.
LEAST_MASS = 1e-30


class TeacherTargets(NamedTuple):
    """What a teacher says of each next token.

    ids_TN: int32, its n likeliest tokens. logp_TN: float32, their log probabilities. rest_T: float32, log of
    the mass of all others; -inf if there are none. A batch puts a B before each.
    """

    ids_TN: Tensor
    logp_TN: Tensor
    rest_T: Tensor


class NextTokenLosses(NamedTuple):
    """loss: carries the gradient. lm, kl: the two parts, detached; all are weighted sums, in nats."""

    loss: Tensor
    lm: Tensor
    kl: Tensor


@torch.no_grad()
def teacher_targets(hidden_TC: Tensor, weight_VC: Tensor, top_n: int) -> TeacherTargets:
    """The teacher's side, from its last hidden states and output embedding."""
    top_n = min(top_n, len(weight_VC))
    parts = []
    for rows_RC in hidden_TC.split(LOGITS_ROWS):
        logp_RV = F.linear(rows_RC, weight_VC).float().log_softmax(-1)
        top = logp_RV.topk(top_n, dim=-1)
        rest_R = logp_RV.scatter_(-1, top.indices, -torch.inf).logsumexp(-1)
        parts.append((top.indices.int(), top.values, rest_R))
    return TeacherTargets(*(torch.cat(part) for part in zip(*parts, strict=True)))


def with_right_answers(targets: TeacherTargets, labels_T: Tensor, answers_T: Tensor) -> TeacherTargets:
    """The targets, where an answer's token is not the teacher's likeliest with these two exchanged.

    A dense model of this size fails at many look-ups. Whoever learned its mistakes would lose those that
    sparse attention alone gets right; its confidence is kept.

    Args:
        labels_T: int64, the token that follows. answers_T: bool, where it is an answer's.
    """
    labels_T1 = labels_T.to(targets.ids_TN)[:, None]
    wrong_T1 = answers_T[:, None].to(labels_T1.device) & (targets.ids_TN[:, :1] != labels_T1)
    is_label_TN = targets.ids_TN == labels_T1
    # Where the right one is not among the n likeliest, it takes the last one's place first.
    place_T1 = torch.where(is_label_TN.any(-1), is_label_TN.int().argmax(-1), is_label_TN.shape[1] - 1)[
        :, None
    ]
    exchanged_TN = targets.ids_TN.scatter(1, place_T1, targets.ids_TN[:, :1])
    exchanged_TN[:, :1] = labels_T1
    return targets._replace(ids_TN=torch.where(wrong_T1, exchanged_TN, targets.ids_TN))


def no_targets(rows: int, device: torch.device) -> TeacherTargets:
    """Where there is no teacher: one bucket with everything, whose KL is 0."""
    empty = torch.empty(rows, 0, device=device)
    return TeacherTargets(empty.int(), empty, torch.zeros(rows, device=device))


def next_token_losses(
    hidden_TC: Tensor,
    weight_VC: Tensor,
    labels_T: Tensor,
    share_T: Tensor,
    targets: TeacherTargets,
    alpha: float,
) -> NextTokenLosses:
    """sum_t share[t] * (alpha * KL[t] + (1 - alpha) * cross-entropy[t]), logits in chunks of rows.

    The gradients of a chunk are taken in closed form while its logits are there, so nothing is computed twice
    and the memory is one chunk, whatever T is (the idea of Liger Kernel's fused linear losses, arXiv
    2410.10989). Differentiable in hidden and weight, once.

    Args:
        hidden_TC, weight_VC: last hidden states and output embedding; logits are in their product's dtype.
        labels_T: int64 tokens. share_T: float32 factor per row, no gradient.
        targets: of the T rows. alpha: 0 .. 1.
    """
    return NextTokenLosses(*_ChunkedLosses.apply(hidden_TC, weight_VC, labels_T, share_T, targets, alpha))


class _ChunkedLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TC: Tensor,
        weight_VC: Tensor,
        labels_T: Tensor,
        share_T: Tensor,
        targets: TeacherTargets,
        alpha: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        dhidden_TC = torch.zeros_like(hidden_TC) if wants_hidden else None
        dweight_VC = torch.zeros_like(weight_VC, dtype=torch.float32) if wants_weight else None
        lm, kl = (torch.zeros((), device=hidden_TC.device) for _ in range(2))
        for low in range(0, len(hidden_TC), LOGITS_ROWS):
            rows = slice(low, low + LOGITS_ROWS)
            logits_RV = F.linear(hidden_TC[rows], weight_VC)
            own = TeacherTargets(*(part[rows] for part in targets))
            lm_R, kl_R, dlogits_RV = _losses_and_gradient(logits_RV.float(), labels_T[rows], own, alpha)
            lm += (lm_R * share_T[rows]).sum()
            kl += (kl_R * share_T[rows]).sum()
            dlogits_RV = dlogits_RV.mul_(share_T[rows, None]).to(logits_RV.dtype)
            if dhidden_TC is not None:
                dhidden_TC[rows] = dlogits_RV @ weight_VC.to(dlogits_RV.dtype)
            if dweight_VC is not None:
                dweight_VC += dlogits_RV.T @ hidden_TC[rows].to(dlogits_RV.dtype)
        ctx.save_for_backward(dhidden_TC, dweight_VC)
        ctx.weight_dtype = weight_VC.dtype
        ctx.mark_non_differentiable(lm, kl)
        return alpha * kl + (1 - alpha) * lm, lm, kl

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dloss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        dhidden_TC, dweight_VC = ctx.saved_tensors
        by_hidden = None if dhidden_TC is None else dhidden_TC * dloss
        by_weight = None if dweight_VC is None else (dweight_VC * dloss).to(ctx.weight_dtype)
        return by_hidden, by_weight, None, None, None, None


def _losses_and_gradient(
    logits_RV: Tensor, labels_R: Tensor, targets: TeacherTargets, alpha: float
) -> tuple[Tensor, Tensor, Tensor]:
    """lm_R, kl_R, and d(alpha KL + (1 - alpha) LM) / d logits; the logits are overwritten.

    The gradient is q - target: for the language model a single 1, for the KL p on X, and outside X the
    student's own proportions scaled to the teacher's mass.
    """
    ids_RN, p_RN = targets.ids_TN.long(), targets.logp_TN.exp()
    logq_RV = logits_RV.sub_(logits_RV.logsumexp(-1, keepdim=True))
    lm_R = -logq_RV.gather(-1, labels_R[:, None])[:, 0]
    top_logq_RN = logq_RV.gather(-1, ids_RN)
    kl_R = (p_RN * (targets.logp_TN - top_logq_RN)).sum(-1)
    rest_q_RV = logq_RV.exp_().scatter_(-1, ids_RN, 0)
    q_rest_R = rest_q_RV.sum(-1).clamp_min(LEAST_MASS)
    p_rest_R = targets.rest_T.exp()
    kl_R += torch.xlogy(p_rest_R, p_rest_R) - p_rest_R * q_rest_R.log()
    gradient_RV = rest_q_RV.mul_(1 - alpha * (p_rest_R / q_rest_R)[:, None])
    gradient_RV.scatter_(-1, ids_RN, top_logq_RN.exp() - alpha * p_RN)
    one_R1 = torch.full_like(labels_R, alpha - 1, dtype=gradient_RV.dtype)[:, None]
    return lm_R, kl_R, gradient_RV.scatter_add_(-1, labels_R[:, None], one_R1)
