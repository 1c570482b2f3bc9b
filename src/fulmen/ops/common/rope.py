"""Rotary positions (RoFormer, arXiv 2104.09864) in the half-split layout: dims p and p + P are a pair."""

import torch
from torch import Tensor


def rotate_half_split(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate dims p and p + P of `x` [..., 2P] by the angle whose cosine and sine [..., P] are given."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def apply_rope(x_BTND: Tensor, cos_BTR: Tensor, sin_BTR: Tensor) -> Tensor:
    """Rotate the first R dims of every head by the model's own table; further dims (partial RoPE) stay."""
    rotary = cos_BTR.shape[-1]
    cos_BT1P, sin_BT1P = cos_BTR[..., None, : rotary // 2], sin_BTR[..., None, : rotary // 2]
    rotated = rotate_half_split(x_BTND[..., :rotary], cos_BT1P, sin_BT1P)
    return rotated if rotary == x_BTND.shape[-1] else torch.cat((rotated, x_BTND[..., rotary:]), dim=-1)
