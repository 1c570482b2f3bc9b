"""What fulmen asks of a model that reads images: where its language model is, and what it becomes."""

import copy
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from fulmen.errors import UnsupportedModelError
from fulmen.modeling.gqa.convert import plain_config
from fulmen.modeling.quantization.formats import quantization_of


@dataclass(frozen=True)
class WholeFamily:
    """A kind of model with a vision tower; `whole_family` makes it from the last of its DSA classes.

    Attributes:
        source_type, dsa_type: `model_type` before and after a conversion.
        text_type: `model_type` of the language model by itself, whose family converts it.
        inner_types: `model_type`s that the language model's config may have inside the whole one's.
        config_class, model_class, whole_class: the DSA classes.
        source_class: the stock model.
    """

    source_type: str
    dsa_type: str
    text_type: str
    inner_types: tuple[str, ...]
    config_class: Any
    model_class: Any
    whole_class: Any
    source_class: Any

    @property
    def auto_classes(self) -> dict[str, type]:
        """The DSA classes by the auto class that finds each."""
        return {
            "AutoConfig": self.config_class,
            "AutoModel": self.model_class,
            "AutoModelForImageTextToText": self.whole_class,
        }

    @property
    def text_prefix(self) -> str:
        """What the names of the language model's weights begin with in the whole model."""
        return f"{self.whole_class.base_model_prefix}.{self.model_class.text_name}."

    def class_of(self, config: PreTrainedConfig) -> Any:
        """The class of the whole model, dense or converted."""
        return self.whole_class if config.model_type == self.dsa_type else self.source_class

    def text_config(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """The config of the language model by itself, dense or converted as the whole model is.

        Raises UnsupportedModelError for a language model of another family, or quantized weights.
        """
        inner: Any = config.get_text_config()
        if (quantization_of(config) or quantization_of(inner)) is not None:
            raise UnsupportedModelError(
                f"model_type {config.model_type!r} with quantized weights is not supported, as it reads "
                "images; take the unquantized model"
            )
        text_config = self.model_class.text_model_class.config_class
        if config.model_type == self.source_type:
            text_config = text_config.__bases__[-1]
            if inner.model_type not in self.inner_types:
                raise UnsupportedModelError(
                    f"model_type {config.model_type!r} around a language model of type {inner.model_type!r} "
                    f"is not supported; around {' or '.join(self.inner_types)} it is"
                )
        # A config of another class, as Qwen2.5-VL's, has the same words.
        text = copy.deepcopy(inner) if type(inner) is text_config else text_config(**plain_config(inner))
        text.tie_word_embeddings = config.tie_word_embeddings
        text.dtype = text.dtype or config.dtype
        return text

    def dsa_config(self, config: PreTrainedConfig, text: PreTrainedConfig) -> PreTrainedConfig:
        """The config of the whole model, converted. text: of its language model, converted by itself."""
        inner = {
            key: value for key, value in text.to_dict().items() if key not in ("architectures", "auto_map")
        }
        tied = text.tie_word_embeddings
        values = {**plain_config(config), "text_config": inner, "tie_word_embeddings": tied}
        made: PreTrainedConfig = self.config_class.from_dict(values)
        return made


def whole_family(whole_class: Any, *, inner_types: tuple[str, ...] | None = None) -> WholeFamily:
    """The family of a DSA model that reads images (`whole_classes`): its class leads to all others.

    inner_types: as in `WholeFamily`; None: the language model's own.
    """
    source: type[PreTrainedModel] = whole_class.__bases__[-1]
    text_type = whole_class.model_class.text_model_class.config_class.model_type.removesuffix("_dsa")
    return WholeFamily(
        source_type=source.config_class.model_type,  # type: ignore[union-attr]
        dsa_type=whole_class.config_class.model_type,
        text_type=text_type,
        inner_types=inner_types or (text_type,),
        config_class=whole_class.config_class,
        model_class=whole_class.model_class,
        whole_class=whole_class,
        source_class=source,
    )
