"""What can be said about a model from its config alone."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from fulmen.config import DsaConfig
from fulmen.evaluation.price.prices import ModelShape
from fulmen.modeling.checkpoint import ModelSource
from fulmen.modeling.cost import (
    cost_rows,
    head_weights,
    index_key_share,
    indexer_cost,
    layer_weights,
    token_bytes,
)
from fulmen.modeling.experts import experts_of
from fulmen.modeling.families import dsa_of, family_like, has_dsa
from fulmen.modeling.index_shape import default_dsa
from fulmen.modeling.linear_layers import linear_layers
from fulmen.modeling.rope_tables import full_attention_rope
from fulmen.modeling.windows import layer_windows
from fulmen.pipeline.conversion_plan import describe_plan
from fulmen.pipeline.description import ModelDescription, layer_ranges
from fulmen.pipeline.model_config import quantized_types, read_config, whole_class_name
from fulmen.pipeline.model_source import dense_source

POSITIONS = (8 * 1024, 32 * 1024, 128 * 1024, 512 * 1024, 1024 * 1024)


def read_shape(source: str) -> tuple[ModelSource, bool, ModelShape]:
    """Where a model is, whether it has DSA, and its shape with the DSA that it has or would get.

    Raises as `read_config` and `default_dsa`.
    """
    found, config = read_config(source)
    converted = has_dsa(config)
    dsa = dsa_of(config) if converted else default_dsa(config)
    # A config without a dtype means float32.
    dtype: Any = config.dtype or torch.float32
    return found, converted, ModelShape(config, dsa, dtype)


def describe(source: str) -> ModelDescription:
    """Read the config and compute all the rest. Raises as `read_config` and `default_dsa`."""
    found, converted, shape = read_shape(source)
    config, dsa, dtype = shape.config, shape.dsa, shape.dtype
    indexer = indexer_cost(config, dsa)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    token_weights = layer_weights(config) + head_weights(config)
    return ModelDescription(
        source=str(found),
        converted=converted,
        model_type=config.model_type,
        architecture=whole_class_name(found) or type(model).__name__,
        parameters=model.num_parameters(),
        indexer_parameters=(indexer.key_weights + indexer.query_weights) * len(dsa.layers),
        active_parameters=token_weights if experts_of(config) else None,
        step_weights=token_weights * dtype.itemsize,
        layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        heads=family_like(config).heads_in_words(config),
        rope=_rope_in_words(config),
        context=getattr(config, "max_position_embeddings", None),
        dtype=str(dtype).removeprefix("torch."),
        quantized=quantized_types(found, config),
        dsa=dsa,
        dense_layers=_dense_layers(config, dsa),
        index_key_share=index_key_share(config, dsa, dtype.itemsize),
        token_bytes=token_bytes(config, dsa, dtype.itemsize),
        rows=cost_rows(config, dsa, POSITIONS, dtype.itemsize),
        plan=None if converted else describe_plan(dense_source(source)),
    )


def _dense_layers(config: PreTrainedConfig, dsa: DsaConfig) -> dict[str, str]:
    windows, linear = layer_windows(config), set(linear_layers(config))
    reasons: dict[str, list[int]] = {}
    for layer in sorted(set(range(config.num_hidden_layers)) - set(dsa.layers)):
        window = windows[layer]
        reason = f"sliding window of {window}: sparse already" if window else "left dense by the conversion"
        if layer in linear:
            reason = "linear attention: no keys to choose from"
        reasons.setdefault(reason, []).append(layer)
    return {layer_ranges(layers): reason for reason, layers in reasons.items()}


def _rope_in_words(config: PreTrainedConfig) -> str:
    sliding = (config.rope_parameters or {}).get("sliding_attention")
    words = _one_rope_in_words(full_attention_rope(config))
    if still := family_like(config).layers_without_rope(config):
        words += f"; none in layers {layer_ranges(still)}"
    return f"{words}; sliding layers: {_one_rope_in_words(sliding)}" if sliding else words


def _one_rope_in_words(values: Mapping[str, Any]) -> str:
    words = [str(values.get("rope_type", "default"))]
    known = {
        "rope_theta": "theta",
        "factor": "factor",
        "original_max_position_embeddings": "original context",
        "attention_factor": "attention factor",
        "partial_rotary_factor": "share of dims",
    }
    words += [f"{name} {values[key]:g}" for key, name in known.items() if values.get(key) is not None]
    for key, name in (("short_factor", "short"), ("long_factor", "long")):
        if factors := values.get(key):
            words.append(f"{name} factors {min(factors):g} to {max(factors):g}")
    return ", ".join(words)
