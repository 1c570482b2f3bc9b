"""Dense attention, the specification: every key of the interval is visible."""

from typing import Any

import torch
from torch import Tensor

from fulmen.ops.attention.reference import AttentionReference, attention_reference
from fulmen.ops.common.intervals import interval_mask
from fulmen.ops.dispatch import implements


def dense_attention_reference(
    q_BTHD: Tensor,
    k_BSGD: Tensor,
    v_BSGV: Tensor,
    start_BT: Tensor,
    stop_BT: Tensor,
    scale: float,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
) -> AttentionReference:
    """See `fulmen.ops.attention.dense.dense_attention`."""
    visible_BTS = interval_mask(start_BT, stop_BT, k_BSGD.shape[1])
    return attention_reference(q_BTHD, k_BSGD, v_BSGV, visible_BTS, scale, softcap, sinks_H)


def dense_gradients_reference(
    dout_BTHV: Tensor,
    dlse_BTH: Tensor,
    q_BTHD: Tensor,
    k_BSGD: Tensor,
    v_BSGV: Tensor,
    start_BT: Tensor,
    stop_BT: Tensor,
    out_BTHV: Tensor,
    lse_BTH: Tensor,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq_BTHD, dk_BSGD and dv_BSGV."""

    def attend(q_BTHD: Tensor, k_BSGD: Tensor, v_BSGV: Tensor) -> tuple[Tensor, Tensor]:
        return reference_dense_attention(q_BTHD, k_BSGD, v_BSGV, start_BT, stop_BT, scale, softcap)

    return torch.func.vjp(attend, q_BTHD, k_BSGD, v_BSGV)[1]((dout_BTHV, dlse_BTH))


@implements("dense_attention", "reference", gradients=dense_gradients_reference)
def reference_dense_attention(*inputs: Any) -> tuple[Tensor, Tensor]:
    """The results alone."""
    result = dense_attention_reference(*inputs)
    return result.out_BTHV, result.lse_BTH
