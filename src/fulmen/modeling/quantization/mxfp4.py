"""MXFP4, in which gpt-oss has its experts: numbers of 4 bits, and a power of two for each 32 of them."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fulmen.modeling.quantization.packed import PackedModule, PackedWeight

BLOCKS, SCALES = "_blocks", "_scales"
# Sign, two bits of exponent, one of mantissa.
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
EXPONENT_BIAS = 127
NUMBERS_PER_BLOCK, BYTES_PER_BLOCK = 32, 16


def mxfp4_weights(modules: list[PackedModule], settings: Mapping[str, Any]) -> dict[str, PackedWeight]:
    """Raises CheckpointError: scales that are missing or do not fit."""
    found = {}
    for module in modules:
        for part in [part for part in module.held if part.endswith(BLOCKS)]:
            name = part.removesuffix(BLOCKS)
            module.require(name + SCALES)
            experts, outputs, groups, size = module.held[part].shape
            if size != BYTES_PER_BLOCK:
                raise module.mismatched(part, f"{BYTES_PER_BLOCK} bytes a block")
            if module.held[name + SCALES].shape != (experts, outputs, groups):
                raise module.mismatched(name + SCALES, [experts, outputs, groups])
            shape = (experts, groups * NUMBERS_PER_BLOCK, outputs)
            names = module.names((part, name + SCALES))
            found[f"{module.name}.{name}"] = PackedWeight(names, shape, partial(_unpacked, name=name))
    return found


def _unpacked(parts: Mapping[str, Tensor], dtype: torch.dtype, *, name: str) -> Tensor:
    """weight_XKN: inputs before outputs, as gpt-oss multiplies; one expert after the other."""
    blocks_XNGB, scales_XNG = parts[name + BLOCKS], parts[name + SCALES]
    table = torch.tensor([*MAGNITUDES, *(-one for one in MAGNITUDES)])
    experts, outputs, groups, _ = blocks_XNGB.shape
    weight_XKN = torch.empty(experts, groups * NUMBERS_PER_BLOCK, outputs, dtype=dtype)
    for out_KN, blocks_NGB, scales_NG in zip(weight_XKN, blocks_XNGB, scales_XNG, strict=True):
        codes_NGBV = torch.stack((blocks_NGB & 15, blocks_NGB >> 4), -1)
        values_NGV = table[codes_NGBV.flatten(-2).int()]
        exponents_NG1 = (scales_NG.int() - EXPONENT_BIAS)[..., None]
        out_KN.copy_(torch.ldexp(values_NGV, exponents_NG1).flatten(1).T)
    return weight_XKN
