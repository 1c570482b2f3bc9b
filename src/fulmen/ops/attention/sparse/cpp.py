"""Sparse attention by the C++ kernels: each query gathers its own keys."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from fulmen.ops.attention.cpp import attend_by_cpp, attention_shape
from fulmen.ops.common.intervals import kernel_positions
from fulmen.ops.common.opaque import SavedTensors
from fulmen.ops.cpp.abi import ROW_MULTIPLE
from fulmen.ops.cpp.library import call_cpp, kernel_floats
from fulmen.ops.dispatch import KERNEL_DTYPES, implements


def sparse_gradients_cpp(
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
    tensors = (q_BTHD, k_BSGD, v_BSGV, topk_BTK, out_BTHV, lse_BTH)
    saved = SavedTensors(*tensors, scale=scale, softcap=softcap)
    backward: Any = CppSparseAttention.backward
    return backward(saved, dout_BTHV, dlse_BTH)[:3]


@implements("sparse_attention", "cpp", dtypes=KERNEL_DTYPES, gradients=sparse_gradients_cpp)
def sparse_attention_cpp(
    q_BTHD: Tensor,
    k_BSGD: Tensor,
    v_BSGV: Tensor,
    topk_BTK: Tensor,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """See `fulmen.ops.attention.sparse.sparse_attention`."""
    return CppSparseAttention.apply(q_BTHD, k_BSGD, v_BSGV, topk_BTK, scale, softcap)


class CppSparseAttention(torch.autograd.Function):
    """`apply(q_BTHD, k_BSGD, v_BSGV, topk_BTK, scale, softcap) -> (out_BTHV, lse_BTH)`."""

    @staticmethod
    def forward(
        ctx: Any,
        q_BTHD: Tensor,
        k_BSGD: Tensor,
        v_BSGV: Tensor,
        topk_BTK: Tensor,
        scale: float,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor]:
        out_BTHV, lse_BTH = attend_by_cpp(q_BTHD, k_BSGD, v_BSGV, scale, softcap, topk_BTK=topk_BTK)
        ctx.save_for_backward(q_BTHD, k_BSGD, v_BSGV, topk_BTK, out_BTHV, lse_BTH)
        ctx.scale, ctx.softcap = scale, softcap
        return out_BTHV, lse_BTH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_BTHV: Tensor, dlse_BTH: Tensor) -> tuple[Tensor | None, ...]:
        q_BTHD, k_BSGD, v_BSGV, topk_BTK, out_BTHV, lse_BTH = ctx.saved_tensors
        keys_BSGD, values_BSGV = kernel_floats(k_BSGD), kernel_floats(v_BSGV)
        q_rows, dout_rows = _whole_rows(q_BTHD), _whole_rows(dout_BTHV)
        dq_rows = torch.zeros_like(q_rows)
        dk_rows = torch.zeros(*k_BSGD.shape[:3], q_rows.shape[-1])
        dv_rows = torch.zeros(*v_BSGV.shape[:3], dout_rows.shape[-1])
        # d loss / d score = prob * (dprob - delta)
        delta_BTH = ((dout_BTHV.float() * out_BTHV).sum(-1) - dlse_BTH).contiguous()
        call_cpp(
            "fulmen_attention_backward",
            *(q_rows, keys_BSGD, values_BSGV, kernel_positions(topk_BTK), dout_rows, lse_BTH, delta_BTH),
            *(dq_rows, dk_rows, dv_rows),
            attention_shape(q_BTHD, keys_BSGD, values_BSGV, topk_BTK.shape[-1]),
            *(float(ctx.scale), float(ctx.softcap or 0)),
        )
        inputs = (q_BTHD, k_BSGD, v_BSGV)
        gradients = zip((dq_rows, dk_rows, dv_rows), inputs, strict=True)
        return *(rows[..., : x.shape[-1]].to(x.dtype) for rows, x in gradients), None, None, None


def _whole_rows(x_BTHD: Tensor) -> Tensor:
    """A contiguous float32 copy with zeros up to a multiple of ROW_MULTIPLE."""
    return pad(x_BTHD.float(), (0, -x_BTHD.shape[-1] % ROW_MULTIPLE)).contiguous()
