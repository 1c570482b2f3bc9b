"""GPTQ and AWQ: integers of a few bits, packed along inputs or outputs; scales by groups of inputs."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fulmen.modeling.quantization.packed import (
    PackedModule,
    PackedWeight,
    group_of_columns,
    unpacked_codes,
)

PARTS = ("qweight", "qzeros", "scales", "g_idx")
# Where AWQ's kernels find the eight columns of one int32.
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
AWQ_BITS = 4
# `gptq` holds zero points less one, as its first kernels wanted them; `gptq_v2` as they are.
ZEROS_LESS_ONE = "gptq"


def gptq_weights(modules: list[PackedModule], settings: Mapping[str, Any]) -> dict[str, PackedWeight]:
    """Raises CheckpointError: a part that is missing or does not fit the others."""
    bits = int(settings["bits"])
    less = int(settings.get("checkpoint_format", ZEROS_LESS_ONE) == ZEROS_LESS_ONE)
    found = {}
    for module in _quantized(modules):
        rows, outputs = module.held["qweight"].shape
        shape = (outputs, rows * 32 // bits)
        _require_groups(module, shape, outputs * bits // 32)
        unpack = partial(_gptq, bits=bits, zeros_less=less)
        found[f"{module.name}.weight"] = PackedWeight(module.names(PARTS), shape, unpack)
    return found


def awq_weights(modules: list[PackedModule], settings: Mapping[str, Any]) -> dict[str, PackedWeight]:
    """Of the layout `gemm`. Raises as `gptq_weights`."""
    found = {}
    for module in _quantized(modules):
        inputs, columns = module.held["qweight"].shape
        shape = (columns * 32 // AWQ_BITS, inputs)
        _require_groups(module, shape, columns)
        found[f"{module.name}.weight"] = PackedWeight(module.names(PARTS), shape, _awq)
    return found


def _quantized(modules: list[PackedModule]) -> list[PackedModule]:
    found = [module for module in modules if "qweight" in module.held]
    for module in found:
        module.require("qzeros", "scales")
    return found


def _require_groups(module: PackedModule, shape: tuple[int, int], zero_columns: int) -> None:
    groups = module.held["scales"].shape[0]
    if module.held["scales"].shape != (groups, shape[0]) or not groups or shape[1] % groups:
        raise module.mismatched("scales", f"groups of {shape[1]} inputs x {shape[0]}")
    if module.held["qzeros"].shape != (groups, zero_columns):
        raise module.mismatched("qzeros", [groups, zero_columns])


def _gptq(parts: Mapping[str, Tensor], dtype: torch.dtype, *, bits: int, zeros_less: int) -> Tensor:
    codes_NK = unpacked_codes(parts["qweight"].T, bits)
    zeros_GN = unpacked_codes(parts["qzeros"], bits)
    zeros_GN = (zeros_GN + zeros_less).bitwise_and_((1 << bits) - 1)
    return _by_groups(codes_NK, zeros_GN, parts["scales"], parts.get("g_idx"), dtype)


def _awq(parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    codes_KN, zeros_GN = (unpacked_codes(parts[part], AWQ_BITS, AWQ_ORDER) for part in ("qweight", "qzeros"))
    return _by_groups(codes_KN.T, zeros_GN, parts["scales"], None, dtype)


def _by_groups(
    codes_NK: Tensor, zeros_GN: Tensor, scales_GN: Tensor, order_K: Tensor | None, dtype: torch.dtype
) -> Tensor:
    group_K = group_of_columns(codes_NK.shape[1], len(scales_GN), order_K)
    weight_NK = codes_NK.float() - zeros_GN.float().T[:, group_K]
    return weight_NK.mul_(scales_GN.float().T[:, group_K]).to(dtype).contiguous()
