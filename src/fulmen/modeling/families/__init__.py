"""All model families, found by themselves: every module of this package is one, in its FAMILY.

A module whose family has DSA classes of fulmen's own is named for the dense `model_type` that it converts.
No model code is imported until a family is asked for.
"""

import importlib
import pkgutil
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fulmen.config import DsaConfig, require_positive_int
from fulmen.errors import AlreadyConvertedError, ConfigError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from fulmen.modeling.family import Family


@cache
def family_names() -> tuple[str, ...]:
    """Names of the modules that hold a family."""
    return tuple(module.name for module in pkgutil.iter_modules(__path__))


@cache
def vision_names() -> tuple[str, ...]:
    """Names of the modules of `fulmen.modeling.vision`, which are `model_type`s of dense models."""
    folder = Path(__file__).parent.with_name("vision")
    return tuple(module.name for module in pkgutil.iter_modules([str(folder)]))


@cache
def import_family(name: str) -> Any:
    """The FAMILY of one module, made known to Transformers' auto classes."""
    family = importlib.import_module(f"{__name__}.{name}").FAMILY
    if not family.is_stock:
        from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

        AutoConfig.register(family.config_class.model_type, family.config_class, exist_ok=True)
        AutoModel.register(family.config_class, family.model_class, exist_ok=True)
        AutoModelForCausalLM.register(family.config_class, family.causal_lm_class, exist_ok=True)
    return family


def all_families() -> "list[Family]":
    """Every family, in the order of their modules' names. Imports the model code of all."""
    return [import_family(name) for name in family_names()]


def known_types() -> list[str]:
    """`model_type`s of the dense models that convert, those that read images included."""
    named = [name for name in family_names() if _is_model_type(name)]
    of_many = (source for family in _families_of_many() for source in family.source_types)
    return sorted([*named, *vision_names(), *of_many])


def family_for(config: "PreTrainedConfig") -> "Family":
    """The family that converts a dense model with this config.

    Raises:
        AlreadyConvertedError: the model has DSA.
        UnsupportedModelError: no family knows its `model_type`.
    """
    return family_for_type(config.model_type)


def family_for_type(model_type: str) -> "Family":
    """`family_for`, where only the `model_type` is known yet."""
    family = _family_with(model_type)
    if family is not None and model_type in family.source_types:
        return family
    if family is not None:
        raise AlreadyConvertedError(
            f"model_type {model_type!r} has DSA already; use it as it is, or go on with fulmen train"
        )
    _require_no_images(model_type)
    from fulmen.modeling.missing_family import needed_entry

    raise UnsupportedModelError(
        f"model_type {model_type!r} has no family; supported: {', '.join(known_types())}; "
        f"{needed_entry(model_type)}"
    )


def _family_with(model_type: Any) -> "Family | None":
    """The family of a dense or a converted model's type; only its own module is imported."""
    # A damaged config may hold anything.
    name = str(model_type).removesuffix("_dsa")
    named = [import_family(name)] if name in family_names() and _is_model_type(name) else []
    for family in named or _families_of_many():
        if model_type in (*family.source_types, *family.dsa_types):
            return family
    return None


def _is_model_type(name: str) -> bool:
    from transformers import CONFIG_MAPPING

    return name in CONFIG_MAPPING


def _families_of_many() -> "list[Family]":
    """Those of several model types, whose modules have names of their own."""
    return [import_family(name) for name in family_names() if not _is_model_type(name)]


def _require_no_images(model_type: Any) -> None:
    """Raise UnsupportedModelError for a model that reads images, which as a whole is no language model."""
    if model_type in vision_names():
        raise UnsupportedModelError(
            f"model_type {model_type!r} reads images too, and is converted from its files; save it, its "
            "tokenizer and processor with save_pretrained(DIR), and convert DIR"
        )


def dsa_family_for(config: "PreTrainedConfig") -> "Family":
    """The family whose conversion made a model with this config, or the language model inside.

    Raises UnsupportedModelError if none did.
    """
    return dsa_family_for_type(config.get_text_config().model_type)


def dsa_family_for_type(model_type: str) -> "Family":
    """`dsa_family_for`, where only the `model_type` is known."""
    family = _family_with(model_type)
    if family is None or model_type not in family.dsa_types:
        raise UnsupportedModelError(
            f"model_type {model_type!r} is not a DSA model; convert it with fulmen first"
        )
    return family


def has_dsa(config: "PreTrainedConfig | None") -> bool:
    """Whether this is the config of a converted model."""
    text: Any = config.get_text_config() if hasattr(config, "get_text_config") else config  # type: ignore[union-attr]
    model_type = getattr(text, "model_type", None)
    family = _family_with(model_type)
    return family is not None and model_type in family.dsa_types


def family_like(config: "PreTrainedConfig") -> "Family":
    """The family of a dense or converted model; for a model that no family knows, one with the same heads."""
    likes = (import_family(name) for name in family_names())
    return _family_with(config.model_type) or next(like for like in likes if like.has_layout(config))


def full_attention_layers(config: "PreTrainedConfig") -> list[int]:
    """Layers of a dense model that can be converted. Raises UnsupportedModelError if there is none."""
    layers = family_for(config).full_attention_layers(config)
    if not layers:
        window = getattr(config, "sliding_window", None)
        raise UnsupportedModelError(
            f"model_type {config.model_type!r} with sliding_window={window} has no full-attention layer "
            "to convert; a window is sparse already"
        )
    return layers


def set_topk(model: "PreTrainedModel", topk: int) -> None:
    """Let every query of a DSA model keep `topk` tokens, from the next forward pass on.

    At or above the length of the text the result is the dense model's. Where layers share the budget unevenly
    (`DsaConfig.topk_shares`), `topk` is their mean. Takes models made by fulmen and Transformers' own DSA
    models (`deepseek_v32`, `glm_moe_dsa`).

    Raises ConfigError if `topk` is no positive integer, or the model has no DSA.
    """
    require_positive_int("topk", topk)
    if not has_dsa(getattr(model, "config", None)):
        raise ConfigError(
            f"{type(model).__name__} has no DSA to set topk={topk} on; convert it with fulmen first"
        )
    dsa_family_for(model.config).set_topk(model, topk)


def dsa_of(config: "PreTrainedConfig") -> DsaConfig:
    """The DSA configuration of a converted model. Raises UnsupportedModelError if it is not one."""
    return dsa_family_for(config).dsa_of(config.get_text_config())


def empty_cache(config: "PreTrainedConfig", max_length: int | None = None) -> Any:
    """An empty cache with room for the index keys of a converted model.

    max_length: tokens to allocate at once; without it the storage doubles as it fills.

    Raises UnsupportedModelError if the model has no DSA.
    """
    return dsa_family_for(config).empty_cache(config.get_text_config(), max_length)


def accelerate_model(model: "PreTrainedModel") -> None:
    """Let a model run on fulmen's ops: those that fulmen made do so by themselves, dense ones never do."""
    if has_dsa(model.config):
        dsa_family_for(model.config).accelerate(model)


def accelerated(model: "PreTrainedModel") -> AbstractContextManager[Any]:
    """`accelerate_model` for the length of a `with` block."""
    return dsa_family_for(model.config).accelerated(model) if has_dsa(model.config) else nullcontext()
