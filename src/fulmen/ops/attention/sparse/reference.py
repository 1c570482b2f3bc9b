"""Sparse attention, the specification: the selected keys are visible, the same ones for all heads."""

from typing import Any

import torch
from torch import Tensor

from fulmen.ops.attention.reference import AttentionReference, attention_reference
from fulmen.ops.common.intervals import selection_mask
from fulmen.ops.dispatch import implements


def sparse_attention_reference(
    q_BTHD: Tensor,
    k_BSGD: Tensor,
    v_BSGV: Tensor,
    topk_BTK: Tensor,
    scale: float,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
) -> AttentionReference:
    """See `fulmen.ops.attention.sparse.sparse_attention`."""
    visible_BTS = selection_mask(topk_BTK, k_BSGD.shape[1])
    return attention_reference(q_BTHD, k_BSGD, v_BSGV, visible_BTS, scale, softcap, sinks_H)


def sparse_gradients_reference(
    dout_BTHV: Tensor,
    dlse_BTH: Tensor,
    q_BTHD: Tensor,
    k_BSGD: Tensor,
    v_BSGV: Tensor,
    topk_BTK: Tensor,
    out_BTHV: Tensor,
    lse_BTH: Tensor,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq_BTHD, dk_BSGD and dv_BSGV."""

    def attend(q_BTHD: Tensor, k_BSGD: Tensor, v_BSGV: Tensor) -> tuple[Tensor, Tensor]:
        return reference_sparse_attention(q_BTHD, k_BSGD, v_BSGV, topk_BTK, scale, softcap)

    return torch.func.vjp(attend, q_BTHD, k_BSGD, v_BSGV)[1]((dout_BTHV, dlse_BTH))


@implements("sparse_attention", "reference", gradients=sparse_gradients_reference)
def reference_sparse_attention(*inputs: Any) -> tuple[Tensor, Tensor]:
    """The results alone."""
    result = sparse_attention_reference(*inputs)
    return result.out_BTHV, result.lse_BTH
