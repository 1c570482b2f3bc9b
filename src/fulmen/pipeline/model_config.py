"""A model's config without its weights."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from fulmen.errors import AlreadyConvertedError, CheckpointError, UnsupportedModelError, first_line
from fulmen.modeling.checkpoint import ModelSource, find_source
from fulmen.modeling.config_checks import read_own_config
from fulmen.modeling.gguf.file import read_gguf
from fulmen.modeling.gguf.weights import read_sound_gguf
from fulmen.modeling.quantization.formats import quantization_in_words, quantization_of
from fulmen.modeling.vision import require_convertible_type, text_config_of, vision_family_for


def read_config(source: str | Path) -> tuple[ModelSource, PreTrainedConfig]:
    """Find a model, dense or converted, and read its config (of a GGUF file: the header).

    Of one that reads images, the config of its language model.

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
        require_convertible_type(values["model_type"])
    return found, text_config_of(read_own_config(found.place))


def whole_class_name(found: ModelSource) -> str | None:
    """Name of the class of a model that reads images; None: it is a language model alone."""
    if found.gguf_file:
        return None
    whole = read_own_config(found.place)
    family = vision_family_for(whole)
    return None if family is None else family.class_of(whole).__name__


def require_language_model_alone(source: str | Path, what: str) -> None:
    """Raise UnsupportedModelError for a model that reads images, which `what` does not take."""
    found = find_source(source)
    if (name := whole_class_name(found)) is not None:
        raise UnsupportedModelError(
            f"{found} is a {name}, which reads images: {what} takes language models alone; convert, inspect, "
            "train, eval and serve take it, and AutoModelForImageTextToText runs it"
        )


def require_no_dense_whole(found: ModelSource) -> None:
    """Raise UnsupportedModelError for a model that reads images and is dense, which is not served."""
    if found.gguf_file or (family := vision_family_for(whole := read_own_config(found.place))) is None:
        return
    if whole.model_type == family.source_type:
        raise UnsupportedModelError(
            f"{found} is a {family.source_class.__name__}, which reads images: it is served, with "
            "texts, once it is converted; run fulmen convert, or serve it with vLLM alone"
        )


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
