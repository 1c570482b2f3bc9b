"""Attention over all keys of each query's interval."""

import torch
from torch import Tensor

from fulmen.ops.attention.dense.cpp import dense_attention_cpp
from fulmen.ops.attention.dense.reference import dense_attention_reference
from fulmen.ops.attention.dense.torch_blocked import dense_attention_blocked
from fulmen.ops.attention.sinks import with_sinks
from fulmen.ops.common.checks import check_attention_inputs, check_softmax_changes
from fulmen.ops.common.opaque import opaque_attention
from fulmen.ops.common.precision import cast_as_autocast, outside_autocast
from fulmen.ops.dispatch import implementation


def dense_attention(
    q_BTHD: Tensor,
    k_BSGD: Tensor,
    v_BSGV: Tensor,
    start_BT: Tensor,
    stop_BT: Tensor,
    scale: float,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of each query over the keys of its interval.

    Query head h reads key head h // (H // G). Differentiable in q, k, v (recomputed block by block).

    Args:
        q_BTHD, k_BSGD, v_BSGV: one floating dtype; H a multiple of G.
        start_BT, stop_BT: int32 or int64; query t sees the keys start <= s < stop, clipped to 0..S.
        scale: factor on q.k before the softmax, usually D ** -0.5.
        softcap: c of logits c tanh(l / c), l = scale * q.k; None: l as it is.
        sinks_H: floats, a logit of each head that takes part in its softmax and has no value; None: none.

    Returns:
        out_BTHV in the dtype of q, and lse_BTH, the natural log of the softmax's denominator, its sink
        included, in float32 (float64 for float64 inputs). A query without keys has out 0 and lse -inf (with
        a sink: that). So parts of a text's keys are merged by their lse if one of them has the sinks.

    Raises:
        ConfigError: axes, heads, dtypes or devices that do not fit together.
        BackendError: a pinned backend that cannot run here.
    """
    q_BTHD, k_BSGD, v_BSGV = cast_as_autocast(q_BTHD, k_BSGD, v_BSGV)
    check_softmax_changes(q_BTHD, softcap, sinks_H)
    out_BTHV, lse_BTH = _attend_to_intervals(q_BTHD, k_BSGD, v_BSGV, start_BT, stop_BT, scale, softcap)
    return with_sinks(out_BTHV, lse_BTH, sinks_H)


def _interval_gradients(
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
    """dq_BTHD, dk_BSGD and dv_BSGV by the backend that computed the outputs."""
    gradients = implementation("dense_attention", q_BTHD.device, q_BTHD.dtype).gradients
    assert gradients is not None
    return gradients(
        dout_BTHV, dlse_BTH, q_BTHD, k_BSGD, v_BSGV, start_BT, stop_BT, out_BTHV, lse_BTH, scale, softcap
    )


@opaque_attention(_interval_gradients)
def _attend_to_intervals(
    q_BTHD: Tensor,
    k_BSGD: Tensor,
    v_BSGV: Tensor,
    start_BT: Tensor,
    stop_BT: Tensor,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    check_attention_inputs(
        {"q_BTHD": q_BTHD, "k_BSGD": k_BSGD, "v_BSGV": v_BSGV}, start_BT=start_BT, stop_BT=stop_BT
    )
    backend = implementation("dense_attention", q_BTHD.device, q_BTHD.dtype)
    with outside_autocast(q_BTHD.device):
        return backend.run(q_BTHD, k_BSGD, v_BSGV, start_BT, stop_BT, scale, softcap)
