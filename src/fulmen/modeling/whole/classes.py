"""The classes of a model that reads images and whose language model has DSA: config, base model, whole model.

They are the stock ones but for the language model, which is a DSA model of its own family. Weights, their
names and the vision tower stay as they are.
"""

from typing import Any, ClassVar

from transformers import MODEL_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)

from fulmen.modeling.gqa.cache import DsaCache
from fulmen.modeling.gqa.model import DsaGenerationMixin, DsaPreTrainedMixin


class DsaWholeModelMixin(DsaPreTrainedMixin):
    """Goes before a stock base model with a language model inside, and puts the DSA one in its place."""

    text_model_class: ClassVar[type[PreTrainedModel]]
    text_name: ClassVar[str]

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        # Where the stock class goes by the config, it has made the right one already.
        if not isinstance(getattr(self, self.text_name), self.text_model_class):
            setattr(self, self.text_name, self.text_model_class._from_config(config.text_config))
            self.post_init()

    def forward(
        self, *args: Any, past_key_values: Cache | None = None, use_cache: bool | None = None, **kwargs: Any
    ) -> Any:
        """As the stock model; makes a DsaCache if one is wanted and none given. Raises as `DsaModelMixin`."""
        use_cache = getattr(self, self.text_name)._wants_cache(use_cache)
        if use_cache and past_key_values is None:
            past_key_values = DsaCache(self.config.text_config)
        return super().forward(  # type: ignore[misc]
            *args, past_key_values=past_key_values, use_cache=use_cache, **kwargs
        )


def whole_classes(
    module: str,
    stock: Any,
    text_model: Any,
    *,
    text_name: str = "language_model",
    model_mixin: type = DsaWholeModelMixin,
) -> tuple[type[PreTrainedConfig], type[PreTrainedModel], type[PreTrainedModel]]:
    """`<X>WholeDsaConfig`, `<X>WholeDsaModel` and `<X>DsaForConditionalGeneration` of a stock model.

    Args:
        module: `__name__` where they get their names.
        stock: Transformers' `<X>ForConditionalGeneration`; its base model has a vision tower.
        text_model: the DSA base model (`dsa_classes`) that takes the language model's place.
        text_name: of the language model in the base model.
        model_mixin: what goes before the stock base model.
    """
    stem = stock.__name__.removesuffix("ForConditionalGeneration")
    stock_config: Any = stock.config_class
    text_config: Any = text_model.config_class
    stock_model: Any = MODEL_MAPPING[stock_config]

    def read_text_config(self: Any, **kwargs: Any) -> None:
        if isinstance(self.text_config, dict):
            self.text_config = text_config(**self.text_config)
        stock_config.__post_init__(self, **kwargs)

    def make(name: str, bases: tuple[Any, ...], **body: Any) -> Any:
        about = f"{bases[-1].__name__} whose language model has an indexer in the converted layers."
        return type(name, bases, {"__module__": module, "__doc__": about, **body})

    config = make(
        f"{stem}WholeDsaConfig",
        (stock_config,),
        model_type=f"{stock_config.model_type}_dsa",
        sub_configs={**stock_config.sub_configs, "text_config": text_config},
        __post_init__=read_text_config,
    )
    model = make(
        f"{stem}WholeDsaModel",
        (model_mixin, stock_model),
        config_class=config,
        text_model_class=text_model,
        text_name=text_name,
    )
    whole = make(
        f"{stem}DsaForConditionalGeneration",
        (DsaGenerationMixin, stock),
        config_class=config,
        model_class=model,
    )
    # The names of stored weights are those of the stock model.
    for stock_name, name in (
        (stock_config.model_type, config.model_type),
        (stock_model.__name__, model.__name__),
        (stock.__name__, whole.__name__),
    ):
        if conversion := get_checkpoint_conversion_mapping(stock_name):
            register_checkpoint_conversion_mapping(name, conversion, overwrite=True)
    return config, model, whole
