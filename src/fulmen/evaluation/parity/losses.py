"""Losses of one text under many variants, read off their last hidden states; logits live in chunks only."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fulmen.errors import ConfigError
from fulmen.evaluation.logits import rows_of_chunk
from fulmen.evaluation.parity.results import TextRow

# Of the first half every fourth prediction is scored: it is not the headline.
FIRST_HALF_STRIDE = 4
POSITION_BUCKETS = 8
SHORTEST_SEQUENCE = 2 * FIRST_HALF_STRIDE * POSITION_BUCKETS


class TextScores(NamedTuple):
    """Scores of the P predictions at `position_P` of one text under one variant, float32 on the CPU.

    loss_P: -log probability of the true next token, nats.
    kl_P: KL(dense || variant), nats.
    agrees_P: bool, whether the likeliest next token is the dense one.
    """

    position_P: Tensor
    loss_P: Tensor
    kl_P: Tensor
    agrees_P: Tensor


def scored_positions(length: int) -> Tensor:
    """Positions whose next token is scored: some of the first half, all of the second.

    Raises ConfigError if the text is too short for every eighth of it to be scored.
    """
    if length < SHORTEST_SEQUENCE:
        raise ConfigError(f"sequences of {length} tokens are too short; use at least {SHORTEST_SEQUENCE}")
    return torch.cat((torch.arange(0, length // 2, FIRST_HALF_STRIDE), torch.arange(length // 2, length - 1)))


@torch.no_grad()
def text_scores(hidden: Mapping[str, Tensor], lm_head: Any, ids_T: Tensor) -> dict[str, TextScores]:
    """Score every variant of one text against the first, which is the dense one.

    Args:
        hidden: last hidden states hidden_TC by variant.
        lm_head: the linear layer that turns them into logits.
        ids_T: the text.
    """
    position_P = scored_positions(len(ids_T))
    columns: dict[str, list[Tensor]] = {name: [] for name in hidden}
    for logp, rows_R in _log_probs(hidden, lm_head, position_P):
        dense_RV = next(iter(logp.values()))
        target_R1 = ids_T[rows_R + 1].to(dense_RV.device)[:, None]
        for name, logp_RV in logp.items():
            loss_R = -logp_RV.gather(1, target_R1).squeeze(1)
            kl_R = nn.functional.kl_div(logp_RV, dense_RV, reduction="none", log_target=True).sum(-1)
            agrees_R = logp_RV.argmax(-1) == dense_RV.argmax(-1)
            columns[name].append(torch.stack((loss_R, kl_R, agrees_R.float())).cpu())
    joined = {name: torch.cat(parts, dim=1) for name, parts in columns.items()}
    return {name: TextScores(position_P, loss, kl, agrees > 0) for name, (loss, kl, agrees) in joined.items()}


def second_half_loss(hidden_TC: Tensor, lm_head: Any, ids_T: Tensor) -> float:
    """Mean loss over the second half of one text, nats per token."""
    scores = text_scores({"only": hidden_TC}, lm_head, ids_T)["only"]
    return summarize_scores(scores, len(ids_T))["second_half"]


def summarize_scores(scores: TextScores, length: int) -> TextRow:
    """Means of one text under one variant; of the whole text estimated from the scored positions."""
    late_P = scores.position_P >= length // 2
    early_mean, late_mean = scores.loss_P[~late_P].mean(), scores.loss_P[late_P].mean()
    n_early, n_late = length // 2, int(late_P.sum())
    bucket_P = scores.position_P * POSITION_BUCKETS // length
    return {
        "second_half": late_mean.item(),
        "whole": ((early_mean * n_early + late_mean * n_late) / (n_early + n_late)).item(),
        "by_position": [scores.loss_P[bucket_P == n].mean().item() for n in range(POSITION_BUCKETS)],
        "kl": scores.kl_P[late_P].mean().item(),
        "agreement": scores.agrees_P[late_P].float().mean().item(),
    }


def _log_probs(
    hidden: Mapping[str, Tensor], lm_head: Any, position_P: Tensor
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """(log-probabilities logp_RV by variant, their positions) chunk by chunk."""
    for rows_R in position_P.split(rows_of_chunk(lm_head)):
        on_device_R = rows_R.to(lm_head.weight.device)
        logp = {name: lm_head(x_TC[on_device_R]).float().log_softmax(-1) for name, x_TC in hidden.items()}
        yield logp, rows_R
