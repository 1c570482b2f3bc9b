"""Attention by the C++ kernel, over any keys; dense and sparse attention differ in those alone."""

import torch
from torch import Tensor

from fulmen.ops.common.intervals import kernel_positions
from fulmen.ops.cpp.abi import AttentionShape
from fulmen.ops.cpp.library import call_cpp, has_tiles, kernel_floats


def attend_by_cpp(
    q_BTHD: Tensor,
    k_BSGD: Tensor,
    v_BSGV: Tensor,
    scale: float,
    softcap: float | None,
    *,
    topk_BTK: Tensor | None = None,
    start_BT: Tensor | None = None,
    stop_BT: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """out_BTHV and lse_BTH over the selected keys, or over those of the intervals; no gradient."""
    dtype = q_BTHD.dtype
    q_BTHD, k_BSGD, v_BSGV = kernel_floats(q_BTHD), kernel_floats(k_BSGD), kernel_floats(v_BSGV)
    shape = attention_shape(q_BTHD, k_BSGD, v_BSGV, 0 if topk_BTK is None else topk_BTK.shape[-1])
    out_BTHV = q_BTHD.new_empty(*q_BTHD.shape[:3], v_BSGV.shape[-1])
    lse_BTH = q_BTHD.new_empty(q_BTHD.shape[:3], dtype=torch.float32)
    call_cpp(
        "fulmen_attention",
        *(q_BTHD.contiguous(), k_BSGD, v_BSGV),
        None if topk_BTK is None else kernel_positions(topk_BTK),
        *(None if x is None else x.long().contiguous() for x in (start_BT, stop_BT)),
        *(out_BTHV, lse_BTH, shape, float(scale), float(softcap or 0)),
    )
    return out_BTHV.to(dtype), lse_BTH


def attention_shape(q_BTHD: Tensor, k_BSGD: Tensor, v_BSGV: Tensor, topk: int) -> AttentionShape:
    """Sizes and strides for a kernel; keys and values as `kernel_floats` gives them."""
    batch, queries, heads, width = q_BTHD.shape
    return AttentionShape(
        *(batch, queries, k_BSGD.shape[1], heads, k_BSGD.shape[2], width, v_BSGV.shape[-1], topk),
        *(k_BSGD.dtype == torch.bfloat16, *k_BSGD.stride()[:3], *v_BSGV.stride()[:3]),
        *(torch.get_num_threads(), has_tiles()),
    )
