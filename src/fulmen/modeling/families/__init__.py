"""All model families, found by themselves: every module of this package that has a FAMILY.

A module whose family has DSA classes of fulmen's own is named for the dense `model_type` that it converts.
No model code is imported until a family is asked for.
"""

import importlib
import pkgutil
from functools import cache
from typing import TYPE_CHECKING, Any

from fulmen.errors import AlreadyConvertedError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from fulmen.modeling.families.base import Family


def family_names() -> list[str]:
    """Names of the modules that may hold a family."""
    return [module.name for module in pkgutil.iter_modules(__path__)]


@cache
def import_family(name: str) -> Any:
    """The FAMILY of one module, made known to Transformers' auto classes; None if it has none."""
    family = getattr(importlib.import_module(f"{__name__}.{name}"), "FAMILY", None)
    if family is not None and hasattr(family, "config_class"):
        from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

        AutoConfig.register(family.config_class.model_type, family.config_class, exist_ok=True)
        AutoModel.register(family.config_class, family.model_class, exist_ok=True)
        AutoModelForCausalLM.register(family.config_class, family.causal_lm_class, exist_ok=True)
    return family


def all_families() -> "list[Family]":
    """Every family, in the order of their modules' names."""
    return [family for name in family_names() if (family := import_family(name))]


def family_for(config: "PreTrainedConfig") -> "Family":
    """The family that converts a dense model with this config.

    Raises:
        AlreadyConvertedError: the model has DSA.
        UnsupportedModelError: no family knows its `model_type`.
    """
    return family_for_type(config.model_type)


def family_for_type(model_type: str) -> "Family":
    """`family_for`, where only the `model_type` is known yet."""
    for family in all_families():
        if model_type in family.source_types:
            return family
        if model_type in family.dsa_types:
            raise AlreadyConvertedError(f"model_type {model_type!r} has DSA already; use the model as it is")
    known = ", ".join(sorted(source for family in all_families() for source in family.source_types))
    raise UnsupportedModelError(
        f"model_type {model_type!r} has no family; supported: {known}; "
        "see 'Add a model family' in CONTRIBUTING.md"
    )


def dsa_family_for(config: "PreTrainedConfig") -> "Family":
    """The family whose conversion made a model with this config. Raises UnsupportedModelError if none did."""
    for family in all_families():
        if config.model_type in family.dsa_types:
            return family
    raise UnsupportedModelError(
        f"model_type {config.model_type!r} is not a DSA model; convert it with fulmen first"
    )


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
