"""Dense attention by the C++ kernel, or, for the many queries of a prompt, by torch's; forward.

The backward pass is that of the blocked torch code: there many queries meet each key, and matrix products are
as fast as anything. Intervals that are not plainly causal (padding, packed documents, windows) and capped
logits are the C++ kernel's, which takes up to 15 % longer than the blocked code for many queries, and a sixth
for few.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fulmen.ops.attention.blocked import BlockedAttention
from fulmen.ops.attention.cpp import attend_by_cpp
from fulmen.ops.attention.dense.causal import dense_attention_causal, fits_causal
from fulmen.ops.attention.dense.torch_blocked import dense_gradients_blocked, visible_blocks
from fulmen.ops.dispatch import KERNEL_DTYPES, implements


@implements("dense_attention", "cpp", dtypes=KERNEL_DTYPES, gradients=dense_gradients_blocked)
def dense_attention_cpp(
    q_BTHD: Tensor,
    k_BSGD: Tensor,
    v_BSGV: Tensor,
    start_BT: Tensor,
    stop_BT: Tensor,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """See `fulmen.ops.attention.dense.dense_attention`."""
    return CppDenseAttention.apply(q_BTHD, k_BSGD, v_BSGV, start_BT, stop_BT, scale, softcap)


class CppDenseAttention(torch.autograd.Function):
    """`apply(q_BTHD, k_BSGD, v_BSGV, start_BT, stop_BT, scale, softcap) -> (out_BTHV, lse_BTH)`."""

    @staticmethod
    def forward(
        ctx: Any,
        q_BTHD: Tensor,
        k_BSGD: Tensor,
        v_BSGV: Tensor,
        start_BT: Tensor,
        stop_BT: Tensor,
        scale: float,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor]:
        qkv, intervals = (q_BTHD, k_BSGD, v_BSGV), {"start_BT": start_BT, "stop_BT": stop_BT}
        if softcap is None and fits_causal(*qkv, **intervals):
            out_BTHV, lse_BTH = dense_attention_causal(*qkv, scale)
        else:
            out_BTHV, lse_BTH = attend_by_cpp(*qkv, scale, softcap, **intervals)
        # The blocked backward pass knows queries that are NaN by their lse, which no value makes NaN here.
        marked_BTH = lse_BTH
        if any(ctx.needs_input_grad):
            marked_BTH = lse_BTH.masked_fill(out_BTHV.isnan().any(-1), torch.nan)
        ctx.save_for_backward(q_BTHD, k_BSGD, v_BSGV, out_BTHV, marked_BTH)
        ctx.scale, ctx.softcap = scale, softcap
        ctx.blocks = visible_blocks(q_BTHD, k_BSGD, start_BT, stop_BT)
        return out_BTHV, lse_BTH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_BTHV: Tensor, dlse_BTH: Tensor) -> tuple[Tensor | None, ...]:
        return *BlockedAttention.backward(ctx, dout_BTHV, dlse_BTH), None
