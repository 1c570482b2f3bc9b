"""Turn a dense GQA model into a DSA model of its family, with random indexers."""

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from fulmen.config import DsaConfig
from fulmen.modeling.family import has_own_head


def convert_gqa(
    dense: PreTrainedModel, dsa: DsaConfig, config_class: Any, causal_lm_class: Any
) -> PreTrainedModel:
    """A DSA model that shares the weights of `dense`, and has a random indexer in each layer of `dsa.layers`.

    Args:
        config_class, causal_lm_class: of the model's family.
    """
    tied = dense.config.tie_word_embeddings and not has_own_head(dense)
    config = dsa_config_for(dense.config, dsa, tied, config_class)
    with torch.device("meta"):
        model = causal_lm_class(config)
    unmatched = model.load_state_dict(dense.state_dict(), assign=True, strict=False)
    assert all(".indexer." in key for key in unmatched.missing_keys), unmatched
    assert not unmatched.unexpected_keys, unmatched
    model.tie_weights()
    _share_buffers(dense, model)
    model.model.rotary_emb = copy.deepcopy(dense.model.rotary_emb)
    for layer in dsa.layers:
        attention = model.model.layers[layer].self_attn
        weight = attention.o_proj.weight
        attention.indexer.to_empty(device=weight.device).to(weight.dtype).apply(model._init_weights)
    model.generation_config = copy.deepcopy(dense.generation_config)
    return model.train(dense.training)


def dsa_config_for(
    config: PreTrainedConfig, dsa: DsaConfig, tied: bool, config_class: Any
) -> PreTrainedConfig:
    """The config of a dense model with DSA. tied: whether the head is the embedding."""
    values = {**plain_config(config), "dsa": dsa.to_dict(), "tie_word_embeddings": tied}
    made: PreTrainedConfig = config_class.from_dict(values)
    return made


def _share_buffers(dense: nn.Module, model: nn.Module) -> None:
    """Give `model` the buffers that no checkpoint holds, as the factor of Gemma's embedding."""
    for name, module in dense.named_modules():
        for key in module._non_persistent_buffers_set:
            model.get_submodule(name)._buffers[key] = module._buffers[key]


def plain_config(config: PreTrainedConfig) -> dict:
    """The config's values without what describes one checkpoint of one class."""
    values = config.to_dict()
    # Attention weights are never made: a source that returns them by default still converts.
    for key in ("model_type", "architectures", "auto_map", "quantization_config", "output_attentions"):
        values.pop(key, None)
    return values
