"""compressed-tensors: FP8, INT8, or 4 and 8 bits in int32; scales for tensors, rows, groups or blocks."""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from fulmen.errors import UnsupportedModelError
from fulmen.modeling.quantization.fp8 import FP8_KINDS, TENSOR_SCALE, scaled_weight
from fulmen.modeling.quantization.packed import (
    PackedModule,
    PackedWeight,
    group_of_columns,
    unpacked_codes,
)

PACKED, SHAPE, ZERO_POINT = "weight_packed", "weight_shape", "weight_zero_point"
COMPRESSED_PARTS = (PACKED, SHAPE, "weight", TENSOR_SCALE, ZERO_POINT, "weight_g_idx")
PACKED_BITS = (4, 8)
# Compressed to nothing that these read: FP4, and weights with zeros left out.
UNREADABLE_PARTS = ("weight_global_scale", "bitmask", "row_offsets", "compressed", "meta")


def compressed_weights(modules: list[PackedModule], settings: Mapping[str, Any]) -> dict[str, PackedWeight]:
    """Raises CheckpointError as `fp8_weights`; UnsupportedModelError for a format that is none of these."""
    blocks = [
        group["weights"].get("block_structure")
        for group in settings["config_groups"].values()
        if isinstance(group, Mapping) and group.get("weights")
    ]
    block = tuple(next((one for one in blocks if one), ()))
    found = {}
    for module in modules:
        _require_readable(module, settings)
        if PACKED in module.held:
            found[f"{module.name}.weight"] = _packed(module)
        elif "weight" in module.held and module.held["weight"].kind in FP8_KINDS:
            module.require(TENSOR_SCALE)
            found[f"{module.name}.weight"] = scaled_weight(module, TENSOR_SCALE, block)
        elif "weight" in module.held and module.held["weight"].kind == "I8":
            module.require(TENSOR_SCALE)
            found[f"{module.name}.weight"] = _bytes(module)
    return found


def _require_readable(module: PackedModule, settings: Mapping[str, Any]) -> None:
    for part in UNREADABLE_PARTS:
        if part in module.held:
            raise UnsupportedModelError(
                f"{module.held[part].file.parent} is quantized (compressed-tensors, "
                f"{settings.get('format')}), and {module.name}.{part} cannot be read; convert it from FP8, "
                "W8A8, W4A16 or the unquantized weights"
            )


def _packed(module: PackedModule) -> PackedWeight:
    module.require(SHAPE, TENSOR_SCALE)
    shape = _stored_shape(module)
    rows, columns = module.held[PACKED].shape
    bits = next((bits for bits in PACKED_BITS if columns == math.ceil(shape[1] * bits / 32)), None)
    if bits is None or rows != shape[0]:
        wanted = [math.ceil(shape[1] * bits / 32) for bits in PACKED_BITS]
        raise module.mismatched(PACKED, f"{shape[0]} x {wanted[0]} or {wanted[1]}")
    _require_scales(module, shape)
    unpack = partial(_from_packed, shape=shape, bits=bits)
    return PackedWeight(module.names(COMPRESSED_PARTS), shape, unpack)


def _bytes(module: PackedModule) -> PackedWeight:
    shape = module.held["weight"].shape
    assert len(shape) == 2, shape
    _require_scales(module, (shape[0], shape[1]))
    return PackedWeight(module.names(COMPRESSED_PARTS), shape, _from_bytes)


def _stored_shape(module: PackedModule) -> tuple[int, int]:
    """Two numbers beside the weight, which is padded to whole int32."""
    with safe_open(module.held[SHAPE].file, "pt") as opened:
        rows, columns = opened.get_tensor(f"{module.name}.{SHAPE}").tolist()
    return int(rows), int(columns)


def _require_scales(module: PackedModule, shape: tuple[int, int]) -> None:
    held = module.held[TENSOR_SCALE].shape
    if math.prod(held) != 1 and (len(held) != 2 or held[0] != shape[0] or shape[1] % held[1]):
        raise module.mismatched(TENSOR_SCALE, f"[1] or {shape[0]} x groups of {shape[1]} inputs")


def _from_packed(
    parts: Mapping[str, Tensor], dtype: torch.dtype, *, shape: tuple[int, int], bits: int
) -> Tensor:
    middle = 1 << (bits - 1)
    codes_NK = unpacked_codes(parts[PACKED], bits)[:, : shape[1]].float() - middle
    zeros = parts.get(ZERO_POINT)
    if zeros is not None and zeros.dtype == torch.int32:
        # Packed along the rows.
        zeros = unpacked_codes(zeros.T, bits)[:, : shape[0]].T.float() - middle
    return _with_scales(codes_NK, zeros, parts, dtype)


def _from_bytes(parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    return _with_scales(parts["weight"].float(), parts.get(ZERO_POINT), parts, dtype)


def _with_scales(
    codes_NK: Tensor, zeros: Tensor | None, parts: Mapping[str, Tensor], dtype: torch.dtype
) -> Tensor:
    scales = parts[TENSOR_SCALE].float()
    if scales.numel() == 1:
        scales = scales.reshape(1, 1)
    order_K = parts.get("weight_g_idx")
    if order_K is not None and int(order_K.min()) < 0:  # there, and not in use
        order_K = None
    group_K = group_of_columns(codes_NK.shape[1], scales.shape[1], order_K)
    if zeros is not None:
        codes_NK = codes_NK - zeros.float().reshape(-1, scales.shape[1])[:, group_K]
    return (codes_NK * scales[:, group_K]).to(dtype)
