"""Attention over all keys of each query's interval."""

from typing import Any

import torch
from torch import Tensor

from fulmen.ops.attention.blocked import BlockedAttention
from fulmen.ops.attention.dense.cpp import dense_attention_cpp
from fulmen.ops.attention.dense.reference import dense_attention_reference
from fulmen.ops.attention.dense.torch_blocked import dense_attention_blocked, visible_blocks
from fulmen.ops.common.checks import check_attention_inputs
from fulmen.ops.common.opaque import SavedTensors, opaque_attention
from fulmen.ops.common.precision import cast_as_autocast, outside_autocast
from fulmen.ops.dispatch import resolve


def dense_attention(
    q_BTHD: Tensor, k_BSGD: Tensor, v_BSGV: Tensor, start_BT: Tensor, stop_BT: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Softmax attention of each query over the keys of its interval.

    Query head h reads key head h // (H // G). Differentiable in q, k, v (recomputed block by block).

    Args:
        q_BTHD, k_BSGD, v_BSGV: one floating dtype; H a multiple of G.
        start_BT, stop_BT: int32 or int64; query t sees the keys start <= s < stop, clipped to 0..S.
        scale: factor on q.k before the softmax, usually D ** -0.5.

    Returns:
        out_BTHV in the dtype of q, and lse_BTH, the natural log of the softmax's denominator, in float32
        (float64 for float64 inputs). A query without keys has out 0 and lse -inf.

    Raises:
        ConfigError: axes, heads, dtypes or devices that do not fit together.
        BackendError: a pinned backend that cannot run here.
    """
    q_BTHD, k_BSGD, v_BSGV = cast_as_autocast(q_BTHD, k_BSGD, v_BSGV)
    return _attend_to_intervals(q_BTHD, k_BSGD, v_BSGV, start_BT, stop_BT, scale)


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
) -> tuple[Tensor, Tensor, Tensor]:
    """dq_BTHD, dk_BSGD and dv_BSGV by the backend that computed the outputs."""
    if resolve("dense_attention", q_BTHD.device, q_BTHD.dtype) == "reference":

        def attend(q_BTHD: Tensor, k_BSGD: Tensor, v_BSGV: Tensor) -> tuple[Tensor, Tensor]:
            result = dense_attention_reference(q_BTHD, k_BSGD, v_BSGV, start_BT, stop_BT, scale)
            return result.out_BTHV, result.lse_BTH

        return torch.func.vjp(attend, q_BTHD, k_BSGD, v_BSGV)[1]((dout_BTHV, dlse_BTH))
    # As in CppDenseAttention, whose lse a bad value does not spoil.
    marked_BTH = lse_BTH.masked_fill(out_BTHV.isnan().any(-1), torch.nan)
    blocks = visible_blocks(q_BTHD, k_BSGD, start_BT, stop_BT)
    saved = SavedTensors(q_BTHD, k_BSGD, v_BSGV, out_BTHV, marked_BTH, scale=scale, blocks=blocks)
    backward: Any = BlockedAttention.backward
    return backward(saved, dout_BTHV, dlse_BTH)[:3]


@opaque_attention(_interval_gradients)
def _attend_to_intervals(
    q_BTHD: Tensor, k_BSGD: Tensor, v_BSGV: Tensor, start_BT: Tensor, stop_BT: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    check_attention_inputs(
        {"q_BTHD": q_BTHD, "k_BSGD": k_BSGD, "v_BSGV": v_BSGV}, start_BT=start_BT, stop_BT=stop_BT
    )
    arguments = (q_BTHD, k_BSGD, v_BSGV, start_BT, stop_BT, scale)
    backend = resolve("dense_attention", q_BTHD.device, q_BTHD.dtype)
    with outside_autocast(q_BTHD.device):
        if backend == "cpp":
            return dense_attention_cpp(*arguments)
        if backend == "torch":
            return dense_attention_blocked(*arguments)
        result = dense_attention_reference(*arguments)
        return result.out_BTHV, result.lse_BTH
