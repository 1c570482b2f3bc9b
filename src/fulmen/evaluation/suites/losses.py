"""Losses of one text's tokens under one variant."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fulmen.errors import CheckpointError, UnsupportedModelError
from fulmen.evaluation.logits import rows_of_chunk

PROBE_TOKENS = 16


@torch.no_grad()
def token_losses(hidden_TC: Tensor, lm_head: Any, ids_T: Tensor) -> Tensor:
    """loss_P, float32 on the CPU, P = T - 1: -log probability of each next token, nats; logits in chunks.

    Raises CheckpointError if one is NaN or infinite.
    """
    rows = rows_of_chunk(lm_head)
    losses = []
    for x_RC, target_R in zip(hidden_TC[:-1].split(rows), ids_T[1:].split(rows), strict=True):
        logits_RV = lm_head(x_RC).float()
        losses.append(
            torch.nn.functional.cross_entropy(logits_RV, target_R.to(x_RC.device), reduction="none")
        )
    loss_P = torch.cat(losses).cpu()
    if not torch.isfinite(loss_P).all():
        raise CheckpointError("a loss is NaN or infinite; the weights are damaged, get them anew")
    return loss_P


@torch.no_grad()
def largest_logit_gap(one_TC: Tensor, other_TC: Tensor, lm_head: Any) -> float:
    """The largest |difference| of a logit between two readings of one text; logits in chunks."""
    rows = rows_of_chunk(lm_head)
    chunks = zip(one_TC.split(rows), other_TC.split(rows), strict=True)
    return max((lm_head(x_RC) - lm_head(y_RC)).float().abs().max().item() for x_RC, y_RC in chunks)


@torch.no_grad()
def require_plain_head(model: PreTrainedModel) -> None:
    """Raise UnsupportedModelError if logits are not `lm_head(hidden)`: some models scale or cap them."""
    ids_BT = torch.arange(PROBE_TOKENS, device=model.device)[None] % model.config.vocab_size
    hidden_BTC = model.base_model(input_ids=ids_BT, use_cache=False).last_hidden_state
    ours_BTV = model.get_output_embeddings()(hidden_BTC).float()
    theirs_BTV = model(input_ids=ids_BT, use_cache=False).logits.float()
    if not torch.allclose(ours_BTV, theirs_BTV, rtol=1e-2, atol=1e-2):
        raise UnsupportedModelError(
            f"{type(model).__name__} changes its logits after the last layer, so keyloss cannot score it; "
            "leave keyloss out of suites",
            arguments=["suites"],
        )
