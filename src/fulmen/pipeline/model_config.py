"""A model's config without its weights."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from fulmen.errors import AlreadyConvertedError, CheckpointError, first_line
from fulmen.modeling.checkpoint import ModelSource, find_source
from fulmen.modeling.config_checks import read_own_config
from fulmen.modeling.families import family_for_type
from fulmen.modeling.gguf.file import read_gguf
from fulmen.modeling.gguf.weights import read_sound_gguf
from fulmen.modeling.quantization.formats import quantization_in_words, quantization_of


def read_config(source: str | Path) -> tuple[ModelSource, PreTrainedConfig]:
    """Find a model, dense or converted, and read its config (of a GGUF file: the header).

    Raises:
        CheckpointError: there is no such model, or its config cannot be read.
        UnsupportedModelError: no family knows its `model_type`, or a GGUF file asks for more than it can.
    """
    found = find_source(source)
    if found.gguf_file:
        return found, read_sound_gguf(str(found))[1]
    values, _ = _readable(found, lambda: PreTrainedConfig.get_config_dict(found.place))
    if not isinstance(values, dict) or not values.get("model_type"):
        raise CheckpointError(f"{found} names no model_type in config.json; it is no Transformers model")
    # A converted model is as welcome here as a dense one.
    with suppress(AlreadyConvertedError):
        family_for_type(values["model_type"])
    return found, read_own_config(found.place)


def quantized_types(found: ModelSource, config: PreTrainedConfig) -> list[str]:
    """Names of the quantized types in a GGUF file, as "Q4_K", or the format of a directory's; else empty."""
    if found.gguf_file:
        return read_gguf(str(found)).quantized_types
    settings = quantization_of(config)
    return [] if settings is None else [quantization_in_words(settings)]


def _readable(found: ModelSource, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except Exception as error:
        raise CheckpointError(
            f"{found} has no readable config.json ({first_line(error)}); get it anew"
        ) from error
