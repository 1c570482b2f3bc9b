"""The classes of a GQA family with DSA, made from the stock ones: config, base model, language model.

A family's module gives them names of its own, by which they are imported and found in a checkpoint's copy of
the source.
"""

import sys
from collections.abc import Callable
from typing import Any

from transformers import MODEL_MAPPING, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)

from fulmen.modeling.gqa.attention import (
    DsaAttentionMixin,
    Preparation,
    Projection,
    take_heads,
    turns_every_layer,
)
from fulmen.modeling.gqa.model import DsaGenerationMixin, DsaModelMixin, accept_any_config


def dsa_classes(
    module: str,
    stock: Any,
    *,
    project: Projection,
    prepare: Preparation = take_heads,
    output_norm: str | None = None,
    turns: Callable[[Any, int], bool] = turns_every_layer,
    require: Callable[[Any], None] = accept_any_config,
) -> tuple[type[PreTrainedConfig], type[PreTrainedModel], type[PreTrainedModel]]:
    """The classes `<X>DsaConfig`, `<X>DsaModel` and `<X>DsaForCausalLM` of Transformers' `<X>ForCausalLM`.

    Args:
        module: `__name__` where they get their names.
        stock: the language model; its base model's layers are `layers[i].self_attn`, of class `<X>Attention`.
        project: `(attention, x_BTC) -> q_BTHD, k_BTGD, v_BTGD`, after bias or norm and before RoPE; and
            gate_BTN, where the attention's output has a gate.
        prepare: `(attention, heads, position_BT) -> heads`, what else lies between these and the logits.
        output_norm: name of the decoder layer's norm of what the attention gives, if it has one.
        turns: `(config, layer)`: whether RoPE turns the heads of a layer.
        require: raises UnsupportedModelError for a config that asks for what the classes do not do.
    """
    stem = stock.__name__.removesuffix("ForCausalLM")
    stock_config: Any = stock.config_class
    stock_attention = getattr(sys.modules[stock.__module__], f"{stem}Attention")

    def make(kind: str, bases: tuple[Any, ...], **body: Any) -> Any:
        about = f"{bases[-1].__name__} with an indexer in the converted layers."
        return type(f"{stem}Dsa{kind}", bases, {"__module__": module, "__doc__": about, **body})

    attention = make(
        "Attention",
        (DsaAttentionMixin, stock_attention),
        project=project,
        prepare=prepare,
        output_norm_name=output_norm,
        turns=staticmethod(turns),
    )
    config = make(
        "Config",
        (stock_config,),
        model_type=f"{stock_config.model_type}_dsa",
        dsa=None,
        __annotations__={"dsa": dict | None},
    )
    if conversion := get_checkpoint_conversion_mapping(stock_config.model_type):
        # Experts are stored one by one, and one tensor in memory.
        register_checkpoint_conversion_mapping(config.model_type, conversion, overwrite=True)
    model = make(
        "Model",
        (DsaModelMixin, MODEL_MAPPING[stock_config]),
        config_class=config,
        attention_class=attention,
        require=staticmethod(require),
    )
    # A model that reads images makes its language model by the config.
    AutoModel.register(config, model, exist_ok=True)
    causal_lm = make("ForCausalLM", (DsaGenerationMixin, stock), config_class=config, model_class=model)
    return config, model, causal_lm
