"""A model's weights as its modules have them, from files where they may be packed, in pieces, or renamed."""

import copy
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig

from fulmen.errors import CheckpointError
from fulmen.modeling.merged_weights import Arrangement, arrangement_of
from fulmen.modeling.quantization.formats import (
    OTHER_SCALES,
    packed_weights,
    quantization_of,
    require_readable_quantization,
)
from fulmen.modeling.quantization.packed import PackedWeight
from fulmen.modeling.shards import SHARD_DTYPES, Shards
from fulmen.modeling.weights import require_shapes

# What a quantized model computes in, if its config does not say.
UNPACKED_DTYPE = torch.bfloat16


class ModelShards(Shards):
    """`Shards` of a model with a config: `shapes`, `tensors` and `blocks` go by the model's names.

    Quantized weights are unpacked as they are read, in the config's dtype. `held` is what lies in the files.
    """

    def __init__(self, folder: Path, config: PreTrainedConfig) -> None:
        """Read the headers alone.

        Raises:
            CheckpointError: as `Shards`, and for parts of quantized weights that do not fit.
            UnsupportedModelError: as `require_readable_quantization`.
        """
        super().__init__(folder)
        settings = quantization_of(config)
        self._packed: dict[str, PackedWeight] = {}
        if settings is not None:
            require_readable_quantization(settings, str(folder))
            self._packed = packed_weights(settings, self.held)
        dtype: Any = config.dtype or UNPACKED_DTYPE
        self._dtype: torch.dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        self._renamed, self._merged = self.arrangement(config.model_type)

    def arrangement(self, model_type: str) -> Arrangement:
        """How the model has the weights that lie in its files."""
        return arrangement_of(model_type, self._unpacked_shapes)

    @property
    def packed_names(self) -> set[str]:
        """Names, in the files, of all that quantized weights are made of."""
        return {name for weight in self._packed.values() for name in weight.parts.values()}

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        held = self._unpacked_shapes
        used = {name for one in self._merged.values() for names in one.sources for name in names}
        used.update(self._renamed.values())
        kept = {name: shape for name, shape in held.items() if name not in used}
        kept |= {name: held[stored] for name, stored in self._renamed.items()}
        return kept | {name: weight.shape for name, weight in self._merged.items()}

    def tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        return {name: self._tensor(name) for name in names}

    def blocks(self, name: str) -> Iterator[Tensor]:
        stored = self._renamed.get(name, name)
        if stored in self._merged or stored in self._packed:
            yield self._tensor(name)
        else:
            yield from self.stored_blocks(stored)

    @cached_property
    def _unpacked_shapes(self) -> dict[str, tuple[int, ...]]:
        parts = self.packed_names
        parts |= {name for name in self.held if OTHER_SCALES.search(name)} if self._packed else set()
        plain = {name: held.shape for name, held in self.held.items() if name not in parts}
        return plain | {name: weight.shape for name, weight in self._packed.items()}

    def _tensor(self, name: str) -> Tensor:
        if name in self._merged:
            return self._merged[name].read(self._unpacked)
        return self._unpacked(self._renamed.get(name, name))

    def _unpacked(self, name: str) -> Tensor:
        if name not in self._packed:
            return super().tensors([name])[name]
        weight = self._packed[name]
        parts = super().tensors(weight.parts.values())
        return weight.unpack({part: parts[held] for part, held in weight.parts.items()}, self._dtype)


def require_float_weights(shards: ModelShards) -> None:
    """Raise CheckpointError for weights that are no floating-point numbers, nor quantized by the config.

    Tensors of one number are counters, and of no use to a language model.
    """
    parts = shards.packed_names
    for name, held in shards.held.items():
        if held.kind not in SHARD_DTYPES and name not in parts and len(held.shape) > 1:
            raise CheckpointError(
                f"{shards.folder} has {name} in {held.kind}, and its config.json says nothing of a "
                "quantization that would explain it; get the config that belongs to the weights"
            )


def require_same_shapes(shards: ModelShards, config: PreTrainedConfig) -> None:
    """Raise CheckpointError for weights of other shapes than those of the dense model with this config."""
    config = copy.deepcopy(config)
    vars(config).pop("quantization_config", None)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    wanted = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    require_shapes(str(shards.folder), wanted, shards.shapes)
