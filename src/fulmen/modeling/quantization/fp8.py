"""FP8 (E4M3) with a scale for each block of 128 x 128 weights, as in DeepSeek-V3's files, or for a tensor."""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fulmen.modeling.quantization.packed import PackedModule, PackedWeight

FP8_KINDS = ("F8_E4M3", "F8_E5M2")
# What the scales are called: by blocks, and by tensor or row.
BLOCK_SCALE, TENSOR_SCALE = "weight_scale_inv", "weight_scale"


def fp8_weights(modules: list[PackedModule], settings: Mapping[str, Any]) -> dict[str, PackedWeight]:
    """Raises CheckpointError: a scale that is missing or does not fit its weight."""
    block = tuple(settings.get("weight_block_size") or ())
    found = {}
    for module in modules:
        if "weight" not in module.held or module.held["weight"].kind not in FP8_KINDS:
            continue
        scale = TENSOR_SCALE if TENSOR_SCALE in module.held else BLOCK_SCALE
        module.require(scale)
        found[f"{module.name}.weight"] = scaled_weight(module, scale, block)
    return found


def scaled_weight(module: PackedModule, scale: str, block: tuple[int, ...]) -> PackedWeight:
    """A weight of 8 bits a number, with one scale, one a row, or one for each `block` of it.

    Raises CheckpointError for a scale that is none of these.
    """
    shape, held = module.held["weight"].shape, module.held[scale].shape
    blocks = tuple(math.ceil(size / step) for size, step in zip(shape, block, strict=False))
    if math.prod(held) == 1 or held == (shape[0], 1):
        block = ()
    elif len(block) != len(shape) or held != blocks:
        raise module.mismatched(scale, f"{[1]}, {[shape[0], 1]} or {list(blocks)}")
    names = module.names(("weight", scale))
    return PackedWeight(names, shape, partial(_scaled, scale=scale, block=block))


def _scaled(parts: Mapping[str, Tensor], dtype: torch.dtype, *, scale: str, block: tuple[int, ...]) -> Tensor:
    weight_NK, scales = parts["weight"].float(), parts[scale].float()
    for axis, step in enumerate(block):
        # The last block of an axis may be cut.
        scales = scales.repeat_interleave(step, axis).narrow(axis, 0, weight_NK.shape[axis])
    return weight_NK.mul_(scales).to(dtype)


def fp8_blocks(
    weight_NK: Tensor, block: tuple[int, int], *, powers_of_two: bool = False
) -> tuple[Tensor, Tensor]:
    """A weight in E4M3 with a scale for each block, as it lies in files: weight, weight_scale_inv (float32).

    The largest number of a block becomes the format's largest, or what the next power of two leaves of it.
    """
    most = torch.finfo(torch.float8_e4m3fn).max
    rows, columns = (math.ceil(size / step) for size, step in zip(weight_NK.shape, block, strict=True))
    padded = weight_NK.new_zeros(rows * block[0], columns * block[1], dtype=torch.float32)
    padded[: weight_NK.shape[0], : weight_NK.shape[1]] = weight_NK
    blocks = padded.unflatten(1, (columns, block[1])).unflatten(0, (rows, block[0]))
    # A block of zeros has any scale.
    scale_RC = blocks.abs().amax((1, 3)).div_(most).clamp_min_(torch.finfo(torch.float32).tiny)
    if powers_of_two:
        scale_RC = scale_RC.log2().ceil_().exp2_()
    codes = (blocks / scale_RC[:, None, :, None]).to(torch.float8_e4m3fn).flatten(2).flatten(0, 1)
    return codes[: weight_NK.shape[0], : weight_NK.shape[1]].contiguous(), scale_RC
