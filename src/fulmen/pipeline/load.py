"""Converted models from their directories, ready to run: GQA and MLA alike, by fulmen's attention."""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from fulmen.modeling.checkpoint import load_directory_model, load_directory_tokenizer
from fulmen.modeling.config_checks import read_own_config
from fulmen.modeling.families import accelerate_model, dsa_of
from fulmen.modeling.text_part import load_whole
from fulmen.modeling.vision import vision_family_for
from fulmen.pipeline.arguments import refused
from fulmen.pipeline.devices import device_of, move
from fulmen.pipeline.model_config import read_config
from fulmen.pipeline.quiet import quiet
from fulmen.pipeline.reporter import SilentReporter
from fulmen.pipeline.settings import DTYPES


def load_accelerated(model_dir: str | Path, dtype: object, device: object) -> tuple[PreTrainedModel, Any]:
    """`load_converted` as `fulmen.load` does it: of this dtype, on this device, by fulmen's attention.

    Raises ConfigError for a dtype or device that cannot be.
    """
    dtype, device = dtype_of(dtype), device_of(device)
    with quiet(SilentReporter()):
        place = _converted_place(model_dir)
        tokenizer = load_directory_tokenizer(place)
        config = read_own_config(place)
        if (family := vision_family_for(config)) is not None:
            model = load_whole(place, config, family, dtype).eval()
        else:
            model = load_directory_model(place, dtype).eval()
        accelerate_model(model)
        return (model if device is None else move(model, device)), tokenizer


def load_converted(model_dir: str | Path) -> tuple[PreTrainedModel, Any]:
    """A converted model as Transformers loads it, in eval mode, and its tokenizer.

    Of one that reads images, the language model by itself.

    Raises:
        CheckpointError: no such model, or one that cannot be read.
        UnsupportedModelError: the model has no DSA.
    """
    tokenizer = load_converted_tokenizer(model_dir)
    return load_converted_model(model_dir), tokenizer


def load_converted_tokenizer(model_dir: str | Path) -> Any:
    """The tokenizer of `load_converted`. Raises as that does, but for what weights tell."""
    return load_directory_tokenizer(_converted_place(model_dir))


def load_converted_model(model_dir: str | Path, device: torch.device | None = None) -> PreTrainedModel:
    """The model of `load_converted`, on a device. Raises as that does, but for the tokenizer; as `move`."""
    model: PreTrainedModel = load_directory_model(_converted_place(model_dir)).eval()
    return model if device is None else move(model, device)


def dtype_of(dtype: object) -> torch.dtype | str:
    """ "auto", or the torch dtype of this name. Raises ConfigError for what weights cannot have."""
    name = str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype
    if name not in DTYPES:
        raise refused("dtype", dtype, f"choose from {', '.join(DTYPES)}")
    return name if name == "auto" else getattr(torch, str(name))


def _converted_place(model_dir: str | Path) -> str:
    found, config = read_config(model_dir)
    dsa_of(config)
    return found.place
