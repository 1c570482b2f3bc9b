"""Models that read images too, found by themselves: every module of this package is one, in its FAMILY.

A module is named for the dense `model_type`. What is converted is the language model inside: all but the
classes around it is asked of that model's own family.
"""

import importlib
from functools import cache
from typing import TYPE_CHECKING, Any

from fulmen.errors import AlreadyConvertedError
from fulmen.modeling.families import family_for_type, import_family, vision_names

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from fulmen.modeling.whole.family import WholeFamily


@cache
def import_vision(name: str) -> "WholeFamily":
    """The FAMILY of one module, made known to Transformers' auto classes."""
    from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

    family: WholeFamily = importlib.import_module(f"{__name__}.{name}").FAMILY
    import_family(family.text_type)
    AutoConfig.register(family.dsa_type, family.config_class, exist_ok=True)
    AutoModel.register(family.config_class, family.model_class, exist_ok=True)
    AutoModelForImageTextToText.register(family.config_class, family.whole_class, exist_ok=True)
    return family


def vision_family_for(config: Any) -> "WholeFamily | None":
    """The family of a dense or converted model that reads images; None for any other model."""
    return _family_with(getattr(config, "model_type", None))


def text_config_of(config: "PreTrainedConfig") -> "PreTrainedConfig":
    """The config of the language model by itself, dense or converted; a model without images is one.

    Raises UnsupportedModelError as `WholeFamily.text_config`.
    """
    family = vision_family_for(config)
    return config if family is None else family.text_config(config)


def require_convertible_type(model_type: Any) -> None:
    """Raise as `family_for_type`, which knows language models alone; those that read images are fine too."""
    family = _family_with(model_type)
    if family is None:
        family_for_type(model_type)
    elif model_type == family.dsa_type:
        raise AlreadyConvertedError(
            f"model_type {model_type!r} has DSA already; use it as it is, or go on with fulmen train"
        )


def _family_with(model_type: Any) -> "WholeFamily | None":
    name = str(model_type).removesuffix("_dsa")
    return import_vision(name) if name in vision_names() else None
