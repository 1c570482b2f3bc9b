"""Attention by the native kernel, forward; the backward pass is that of the blocked torch code."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fulmen.ops.attention_blocked import AttentionBlocks, BlockedAttention
from fulmen.ops.native_library import AttentionShape, call_native, kernel_floats

# The keys of each query: (topk_BTK, None, None) or (None, start_BT, stop_BT).
NativeKeys = tuple[Tensor | None, Tensor | None, Tensor | None]


class NativeAttention(torch.autograd.Function):
    """`apply(q_BTHD, k_BSGD, v_BSGV, scale, blocks, keys) -> (out_BTHV, lse_BTH)`."""

    @staticmethod
    def forward(
        ctx: Any,
        q_BTHD: Tensor,
        k_BSGD: Tensor,
        v_BSGV: Tensor,
        scale: float,
        blocks: AttentionBlocks,
        keys: NativeKeys,
    ) -> tuple[Tensor, Tensor]:
        out_BTHV, lse_BTH = _attend_natively(q_BTHD, k_BSGD, v_BSGV, scale, keys)
        # NaN in a value leaves lse finite here; the blocked backward pass knows spoilt queries by their lse.
        marked_BTH = lse_BTH.masked_fill(out_BTHV.isnan().any(-1), torch.nan)
        ctx.save_for_backward(q_BTHD, k_BSGD, v_BSGV, out_BTHV, marked_BTH)
        ctx.scale, ctx.blocks = scale, blocks
        return out_BTHV, lse_BTH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_BTHV: Tensor, dlse_BTH: Tensor) -> tuple[Tensor | None, ...]:
        return *BlockedAttention.backward(ctx, dout_BTHV, dlse_BTH), None


def _attend_natively(
    q_BTHD: Tensor, k_BSGD: Tensor, v_BSGV: Tensor, scale: float, keys: NativeKeys
) -> tuple[Tensor, Tensor]:
    topk_BTK, start_BT, stop_BT = keys
    batch, queries, heads, width = q_BTHD.shape
    k_BSGD, v_BSGV = kernel_floats(k_BSGD), kernel_floats(v_BSGV)
    shape = AttentionShape(
        *(batch, queries, k_BSGD.shape[1], heads, k_BSGD.shape[2], width, v_BSGV.shape[-1]),
        *(0 if topk_BTK is None else topk_BTK.shape[-1], k_BSGD.dtype == torch.bfloat16),
        *(*k_BSGD.stride()[:3], *v_BSGV.stride()[:3], torch.get_num_threads()),
    )
    out_BTHV = torch.empty(batch, queries, heads, v_BSGV.shape[-1])
    lse_BTH = torch.empty(batch, queries, heads)
    call_native(
        "fulmen_attention",
        *(q_BTHD.float().contiguous(), k_BSGD, v_BSGV),
        None if topk_BTK is None else topk_BTK.int().contiguous(),
        *(None if x is None else x.long().contiguous() for x in (start_BT, stop_BT)),
        *(out_BTHV, lse_BTH, shape, float(scale)),
    )
    return out_BTHV.to(q_BTHD.dtype), lse_BTH
