"""Attention over the selected keys only."""

import torch
from torch import Tensor

from fulmen.ops.attention.sinks import with_sinks
from fulmen.ops.attention.sparse.cpp import sparse_attention_cpp
from fulmen.ops.attention.sparse.reference import sparse_attention_reference
from fulmen.ops.attention.sparse.torch_blocked import sparse_attention_blocked
from fulmen.ops.common.checks import check_attention_inputs, check_softmax_changes, check_topk_below
from fulmen.ops.common.opaque import opaque_attention
from fulmen.ops.common.precision import cast_as_autocast, outside_autocast
from fulmen.ops.dispatch import implementation, implements_by_name

implements_by_name(
    "sparse_attention",
    "triton",
    "fulmen.ops.attention.sparse.triton:sparse_attention_triton",
    gradients="fulmen.ops.attention.sparse.triton:sparse_gradients_triton",
)


def sparse_attention(
    q_BTHD: Tensor,
    k_BSGD: Tensor,
    v_BSGV: Tensor,
    topk_BTK: Tensor,
    scale: float,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of each query over its selected keys, one set for all heads of the layer.

    DeepSeek-V3.2 (arXiv 2512.02556, section 2.1). Works on expanded keys (G = H), grouped ones, and absorbed
    latents (G = 1, D != V). Differentiable in q, k, v (recomputed block by block).

    Args:
        q_BTHD, k_BSGD, v_BSGV: one floating dtype; H a multiple of G; head h reads key head h // (H // G).
        topk_BTK: int32 or int64, below S, distinct within a row, in any order; negative means nothing.
        scale: factor on q.k before the softmax, usually D ** -0.5.
        softcap: c of logits c tanh(l / c), l = scale * q.k; None: l as it is.
        sinks_H: floats, a logit of each head that takes part in its softmax and has no value; None: none.

    Returns:
        out_BTHV in the dtype of q, and lse_BTH, the natural log of the softmax's denominator, its sink
        included, in float32 (float64 for float64 inputs). A query without keys has out 0 and lse -inf (with
        a sink: that). So parts of a text's keys are merged by their lse if one of them has the sinks.

    Raises:
        ConfigError: axes, heads, dtypes or devices that do not fit together, or an index beyond the keys
            (on a GPU that is an assertion of the device, as in torch's own indexing).
        BackendError: a pinned backend that cannot run here.
    """
    q_BTHD, k_BSGD, v_BSGV = cast_as_autocast(q_BTHD, k_BSGD, v_BSGV)
    check_softmax_changes(q_BTHD, softcap, sinks_H)
    out_BTHV, lse_BTH = _attend_to_selected(q_BTHD, k_BSGD, v_BSGV, topk_BTK, scale, softcap)
    return with_sinks(out_BTHV, lse_BTH, sinks_H)


def _selected_gradients(
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
    """dq_BTHD, dk_BSGD and dv_BSGV by the backend that computed the outputs."""
    gradients = implementation("sparse_attention", q_BTHD.device, q_BTHD.dtype).gradients
    assert gradients is not None
    return gradients(dout_BTHV, dlse_BTH, q_BTHD, k_BSGD, v_BSGV, topk_BTK, out_BTHV, lse_BTH, scale, softcap)


@opaque_attention(_selected_gradients)
def _attend_to_selected(
    q_BTHD: Tensor,
    k_BSGD: Tensor,
    v_BSGV: Tensor,
    topk_BTK: Tensor,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    sizes = check_attention_inputs({"q_BTHD": q_BTHD, "k_BSGD": k_BSGD, "v_BSGV": v_BSGV}, topk_BTK=topk_BTK)
    backend = implementation("sparse_attention", q_BTHD.device, q_BTHD.dtype)
    check_topk_below(topk_BTK, sizes["S"])
    with outside_autocast(q_BTHD.device):
        return backend.run(q_BTHD, k_BSGD, v_BSGV, topk_BTK, scale, softcap)
