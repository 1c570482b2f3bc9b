"""Weights that a quantized model's files hold packed: which parts each is made of, and how it is unpacked."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fulmen.errors import CheckpointError
from fulmen.modeling.shards import Held

Unpack = Callable[[Mapping[str, Tensor], torch.dtype], Tensor]


class PackedWeight(NamedTuple):
    """A weight in several parts, in words of its format.

    Attributes:
        parts: what the format calls each part, with its name in the files.
        shape: of the weight, unpacked.
        unpack: makes the weight, of a dtype, from its parts by the format's names.
    """

    parts: Mapping[str, str]
    shape: tuple[int, ...]
    unpack: Unpack


class PackedModule(NamedTuple):
    """What the files hold of one module: its name, and all tensors by the last part of theirs."""

    name: str
    held: Mapping[str, Held]

    def names(self, parts: tuple[str, ...]) -> dict[str, str]:
        """Those of these parts that are there, with their full names."""
        return {part: f"{self.name}.{part}" for part in parts if part in self.held}

    def require(self, *parts: str) -> None:
        """Raise CheckpointError that names the first of these parts that is not there."""
        for part in parts:
            if part not in self.held:
                file = next(iter(self.held.values())).file
                raise CheckpointError(
                    f"{file.parent} lacks {self.name}.{part}, of which a weight is made; get it anew"
                )

    def mismatched(self, part: str, wanted: object) -> CheckpointError:
        """The error for a part that does not fit the others."""
        held = self.held[part]
        return CheckpointError(
            f"{held.file.parent} has {self.name}.{part} of the shape {list(held.shape)}, where the other "
            f"parts ask for {wanted}; get it anew"
        )


FindPacked = Callable[[list[PackedModule], Mapping[str, Any]], dict[str, PackedWeight]]


def packed_modules(held: Mapping[str, Held]) -> list[PackedModule]:
    """The tensors of files, module by module."""
    found: dict[str, dict[str, Held]] = {}
    for name, one in held.items():
        module, _, part = name.rpartition(".")
        found.setdefault(module, {})[part] = one
    return [PackedModule(name, parts) for name, parts in found.items()]


def unpacked_codes(packed: Tensor, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """The codes, uint8, that the int32 of the last axis hold, lowest bits first: [..., n * 32 / bits].

    order: where the codes of one int32 belong, if not in their own order.
    """
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    codes = (packed.unsqueeze(-1) >> shifts).bitwise_and_((1 << bits) - 1).to(torch.uint8)
    return (codes if order is None else codes[..., list(order)]).flatten(-2)


def group_of_columns(n_columns: int, n_groups: int, order_C: Tensor | None) -> Tensor:
    """The group whose scale each column has: equal runs, or as `order_C` says. int64 [C]."""
    if order_C is not None:
        return order_C.long()
    return torch.arange(n_columns) // (n_columns // n_groups)
