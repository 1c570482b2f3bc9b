"""Attention over the selected keys only."""

from typing import Any

import torch
from torch import Tensor

from fulmen.ops.attention.blocked import BlockedAttention
from fulmen.ops.attention.sparse.cpp import CppSparseAttention, sparse_attention_cpp
from fulmen.ops.attention.sparse.reference import sparse_attention_reference
from fulmen.ops.attention.sparse.torch_blocked import selected_blocks, sparse_attention_blocked
from fulmen.ops.common.checks import check_attention_inputs, check_topk_below
from fulmen.ops.common.opaque import SavedTensors, opaque_attention
from fulmen.ops.common.precision import cast_as_autocast, outside_autocast
from fulmen.ops.dispatch import resolve
from fulmen.ops.triton_support import triton_kernels


def sparse_attention(
    q_BTHD: Tensor, k_BSGD: Tensor, v_BSGV: Tensor, topk_BTK: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Softmax attention of each query over its selected keys, one set for all heads of the layer.

    DeepSeek-V3.2 (arXiv 2512.02556, section 2.1). Works on expanded keys (G = H), grouped ones, and absorbed
    latents (G = 1, D != V). Differentiable in q, k, v (recomputed block by block).

    Args:
        q_BTHD, k_BSGD, v_BSGV: one floating dtype; H a multiple of G; head h reads key head h // (H // G).
        topk_BTK: int32 or int64, below S, distinct within a row, in any order; negative means nothing.
        scale: factor on q.k before the softmax, usually D ** -0.5.

    Returns:
        out_BTHV in the dtype of q, and lse_BTH, the natural log of the softmax's denominator, in float32
        (float64 for float64 inputs). A query without keys has out 0 and lse -inf.

    Raises:
        ConfigError: axes, heads, dtypes or devices that do not fit together, or an index beyond the keys.
        BackendError: a pinned backend that cannot run here.
    """
    q_BTHD, k_BSGD, v_BSGV = cast_as_autocast(q_BTHD, k_BSGD, v_BSGV)
    return _attend_to_selected(q_BTHD, k_BSGD, v_BSGV, topk_BTK, scale)


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
) -> tuple[Tensor, Tensor, Tensor]:
    """dq_BTHD, dk_BSGD and dv_BSGV by the backend that computed the outputs."""
    backend = resolve("sparse_attention", q_BTHD.device, q_BTHD.dtype)
    qkv, results = (q_BTHD, k_BSGD, v_BSGV), (out_BTHV, lse_BTH)
    if backend == "reference":

        def attend(q_BTHD: Tensor, k_BSGD: Tensor, v_BSGV: Tensor) -> tuple[Tensor, Tensor]:
            result = sparse_attention_reference(q_BTHD, k_BSGD, v_BSGV, topk_BTK, scale)
            return result.out_BTHV, result.lse_BTH

        return torch.func.vjp(attend, *qkv)[1]((dout_BTHV, dlse_BTH))
    function: Any = CppSparseAttention
    saved = SavedTensors(*qkv, topk_BTK, *results, scale=scale)
    if backend == "torch":
        function = BlockedAttention
        saved = SavedTensors(*qkv, *results, scale=scale, blocks=selected_blocks(q_BTHD, k_BSGD, topk_BTK))
    elif backend == "triton":
        function = triton_kernels("attention.sparse").TritonSparseAttention
    return function.backward(saved, dout_BTHV, dlse_BTH)[:3]


@opaque_attention(_selected_gradients)
def _attend_to_selected(
    q_BTHD: Tensor, k_BSGD: Tensor, v_BSGV: Tensor, topk_BTK: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    sizes = check_attention_inputs({"q_BTHD": q_BTHD, "k_BSGD": k_BSGD, "v_BSGV": v_BSGV}, topk_BTK=topk_BTK)
    check_topk_below(topk_BTK, sizes["S"])
    arguments = (q_BTHD, k_BSGD, v_BSGV, topk_BTK, scale)
    backend = resolve("sparse_attention", q_BTHD.device, q_BTHD.dtype)
    with outside_autocast(q_BTHD.device):
        if backend == "cpp":
            return sparse_attention_cpp(*arguments)
        if backend == "triton":
            return triton_kernels("attention.sparse").sparse_attention_triton(*arguments)
        if backend == "torch":
            return sparse_attention_blocked(*arguments)
        result = sparse_attention_reference(*arguments)
        return result.out_BTHV, result.lse_BTH
