"""The dense model of a conversion: a place to read it from, or one in memory."""

import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from fulmen.config import DsaConfig
from fulmen.errors import UnsupportedModelError
from fulmen.modeling.by_layers import LayeredModel, layered_model, require_layered
from fulmen.modeling.checkpoint import (
    ModelSource,
    load_dense,
    load_tokenizer,
    require_finite,
    require_supported_config,
)
from fulmen.modeling.config_checks import require_sound_config, require_tokens_fit
from fulmen.modeling.families import family_for
from fulmen.modeling.merged_weights import can_merge
from fulmen.modeling.model_shards import ModelShards, require_float_weights, require_same_shapes
from fulmen.modeling.quantization.formats import quantization_of, require_readable_quantization
from fulmen.modeling.shards import SHARD_DTYPES
from fulmen.modeling.text_part import TextShards, open_shards, shards_around
from fulmen.modeling.weights import EMBEDDING, HEAD
from fulmen.ops.half_products import hasten_half_products
from fulmen.pipeline.arguments import refused
from fulmen.pipeline.devices import move
from fulmen.pipeline.fingerprint import weights_fingerprint
from fulmen.pipeline.model_config import quantized_types, read_config
from fulmen.pipeline.settings import ModelInMemory


class DenseSource(Protocol):
    """A dense model that is not loaded yet, or not looked at."""

    @property
    def name(self) -> str:
        """For records, cards and messages."""
        ...

    @property
    def config(self) -> PreTrainedConfig:
        """Its config."""
        ...

    @property
    def quantized(self) -> list[str]:
        """Types of weights that loading dequantizes."""
        ...

    def tokenizer(self) -> Any:
        """Its tokenizer. Raises CheckpointError if there is none, or it does not fit."""
        ...

    def load(
        self, dtype: torch.dtype | str, device: torch.device | None, *, to_change: bool
    ) -> PreTrainedModel:
        """The model on a device; one whose weights are not written to unless it is `to_change`."""
        ...

    @property
    def stays_quantized(self) -> bool:
        """Whether a conversion by layers leaves its weights quantized, where loading dequantizes them."""
        ...

    def look_at_files(self) -> list[str]:
        """What is unusual about its files, a line each; no weight is read.

        Raises:
            CheckpointError: parts that are missing, cut short, or not of one model with the config.
            UnsupportedModelError: quantized in a format that cannot be read.
        """
        ...

    def around(self) -> TextShards | None:
        """The files of the model that reads images around it; None: it is a language model alone."""
        ...

    @property
    def loaded_bytes(self) -> int:
        """What of it is in memory already."""
        ...

    @property
    def has_layers(self) -> bool:
        """Whether `layered` has what it needs, as far as the config tells."""
        ...

    def layered(self, dsa: DsaConfig, device: torch.device) -> LayeredModel:
        """A DSA model whose layers are read as they run. Raises UnsupportedModelError, CheckpointError."""
        ...

    def identity(self) -> dict[str, Any]:
        """What tells it from others, of plain JSON types."""
        ...


def dense_source(source: str | ModelInMemory) -> DenseSource:
    """What a conversion begins with.

    Raises:
        CheckpointError, UnsupportedModelError: as `read_config`; of a model in memory also weights that are
            quantized, not finite, or not in one place.
        ConfigError: an object that is no model, or no tokenizer.
    """
    return (
        LoadedSource(source)
        if isinstance(source, ModelInMemory)
        else PlaceSource(*read_config(source), source)
    )


@dataclass(frozen=True)
class PlaceSource:
    """A directory, a name on the hub, or a GGUF file."""

    found: ModelSource
    config: PreTrainedConfig
    name: str

    @property
    def quantized(self) -> list[str]:
        """As `DenseSource.quantized`."""
        return quantized_types(self.found, self.config)

    def tokenizer(self) -> Any:
        """As `DenseSource.tokenizer`."""
        return load_tokenizer(self.found, self.config.vocab_size)

    def load(
        self, dtype: torch.dtype | str, device: torch.device | None, *, to_change: bool
    ) -> PreTrainedModel:
        """As `DenseSource.load`; None: on the CPU. Raises as `load_dense` and `move`."""
        model = load_dense(self.name, dtype)[0]
        if (around := self.around()) is not None:
            around.require_finite_around()
        return model if device is None else move(model, device)

    @property
    def stays_quantized(self) -> bool:
        """As `DenseSource.stays_quantized`."""
        return self.found.gguf_file is None and quantization_of(self.config) is not None

    def look_at_files(self) -> list[str]:
        """As `DenseSource.look_at_files`; those of the hub are looked at as they are loaded."""
        if self.found.gguf_file:
            return []
        if (settings := quantization_of(self.config)) is not None:
            require_readable_quantization(settings, self.name)
        if not Path(self.found.place).is_dir() or not can_merge(self.config.model_type):
            return []
        shards = open_shards(self.found.place, self.config)
        if isinstance(shards, TextShards):
            shards.require_all_held()
        require_float_weights(shards)
        require_same_shapes(shards, self.config)
        return _unusual(shards, self.config)

    def around(self) -> TextShards | None:
        """As `DenseSource.around`."""
        return None if self.found.gguf_file else shards_around(self.found.place)

    @property
    def loaded_bytes(self) -> int:
        """As `DenseSource.loaded_bytes`."""
        return 0

    @property
    def has_layers(self) -> bool:
        """As `DenseSource.has_layers`."""
        try:
            require_layered(self.config)
        except UnsupportedModelError:
            return False
        return self.found.gguf_file is None

    def layered(self, dsa: DsaConfig, device: torch.device) -> LayeredModel:
        """As `DenseSource.layered`. Raises as `layered_model`."""
        if self.found.gguf_file:
            raise UnsupportedModelError(
                f"{self.found} cannot be converted layer by layer, as it is dequantized at once; leave "
                "by_layers out, or name a directory of safetensors"
            )
        require_supported_config(self.found)
        shards = open_shards(self.found.place, self.config)
        return layered_model(self.config, dsa, shards, device)

    def identity(self) -> dict[str, Any]:
        """As `DenseSource.identity`."""
        return {"source": self.name}


class LoadedSource:
    """A model in memory, which stays as it is: the result shares its weights where they stay the same."""

    quantized: list[str] = []  # noqa: RUF012 (what cannot be is refused)
    stays_quantized = has_layers = False

    def __init__(self, source: ModelInMemory) -> None:
        self._model, self._tokenizer = source.model, source.tokenizer
        _require_model(self._model)
        if not isinstance(self._tokenizer, PreTrainedTokenizerBase):
            raise refused("tokenizer", self._tokenizer, "a model in memory needs its tokenizer beside it")
        self.config: PreTrainedConfig = self._model.config
        require_sound_config(self.config, self.name)
        require_finite(self._model, self.name)
        hasten_half_products(self._model.dtype)

    @property
    def name(self) -> str:
        """As `DenseSource.name`: where the model came from, or its class."""
        return self._model.name_or_path or f"{type(self._model).__name__} in memory"

    def tokenizer(self) -> Any:
        """As `DenseSource.tokenizer`."""
        require_tokens_fit(self._tokenizer, self.config.vocab_size, self.name)
        return self._tokenizer

    def load(
        self, dtype: torch.dtype | str, device: torch.device | None, *, to_change: bool
    ) -> PreTrainedModel:
        """As `DenseSource.load`: the model itself, or a copy if weights are to change, move, or be others.

        None: where it lies. Raises as `move`.
        """
        moves = device is not None and device.type != self._model.device.type
        if dtype in ("auto", self._model.dtype) and not to_change and not moves:
            return self._model
        copied = copy.deepcopy(self._model)
        copied = copied if dtype == "auto" else copied.to(dtype)  # type: ignore[arg-type]
        return move(copied, device) if moves else copied  # type: ignore[arg-type]

    @property
    def loaded_bytes(self) -> int:
        """As `DenseSource.loaded_bytes`."""
        return sum(tensor.nbytes for tensor in self._model.parameters())

    def look_at_files(self) -> list[str]:
        """As `DenseSource.look_at_files`: it has none."""
        return []

    def around(self) -> None:
        """As `DenseSource.around`: a model in memory is a language model alone."""

    def layered(self, dsa: DsaConfig, device: torch.device) -> LayeredModel:
        """As `DenseSource.layered`: never."""
        raise UnsupportedModelError(f"source, {self.name}, is in memory as a whole; leave by_layers out")

    def identity(self) -> dict[str, Any]:
        """As `DenseSource.identity`."""
        return {"source": self.name, "source_weights": self._fingerprint}

    @cached_property
    def _fingerprint(self) -> str:
        return weights_fingerprint(self._model.state_dict())


def _unusual(shards: ModelShards, config: PreTrainedConfig) -> list[str]:
    said = []
    if len(kinds := [kind for kind in shards.kinds if kind in SHARD_DTYPES]) > 1 and not shards.packed_names:
        said.append(f"Its weights are of several types ({', '.join(kinds)}); loaded, all are of one")
    if config.tie_word_embeddings and {HEAD, EMBEDDING} <= shards.shapes.keys():
        said.append(
            "Head and embedding are both stored, where config.json calls them one; if they differ, both stay"
        )
    return said


def _require_model(model: Any) -> None:
    """Raise for what is no whole, unquantized language model of a known family."""
    if not isinstance(model, PreTrainedModel):
        merge = (
            "; merge its adapter first: model.merge_and_unload()"
            if hasattr(model, "merge_and_unload")
            else ""
        )
        raise refused(
            "source",
            type(model).__name__,
            f"give a model's directory or name, or a model of Transformers{merge}",
        )
    name = type(model).__name__
    family_for(model.config)
    known: Any = AutoModelForCausalLM._model_mapping.get(type(model.config), None)
    if known is not None and not isinstance(model, known):
        raise UnsupportedModelError(f"source is a {name}, no language model; give a {known.__name__}")
    if getattr(model, "is_quantized", False) or getattr(model.config, "quantization_config", None):
        raise UnsupportedModelError(f"source, a {name}, is quantized; convert the unquantized weights")
    if getattr(model, "_hf_peft_config_loaded", False):
        raise UnsupportedModelError(f"source, a {name}, has adapters; merge them into its weights first")
    places = {tensor.device for tensor in model.state_dict().values()}
    if torch.device("meta") in places or len(places) > 1:
        where = ", ".join(sorted(map(str, places)))
        raise UnsupportedModelError(
            f"source, a {name}, has its weights on {where}; load it whole on one device, without device_map"
        )
