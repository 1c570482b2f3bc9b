"""What fulmen must know about a model family: each family's file makes one such record, called FAMILY."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from fulmen.config import DsaConfig


@dataclass(frozen=True)
class Family:
    """Model types that convert, model types that are the result, and the layers that can.

    Attributes:
        source_types: `model_type`s of dense models.
        dsa_types: `model_type`s of DSA models, the first being what a conversion makes.
        full_attention_layers: indices of the layers whose attention sees all of the past.
    """

    source_types: tuple[str, ...]
    dsa_types: tuple[str, ...]
    full_attention_layers: Callable[[PreTrainedConfig], list[int]]

    def require_convertible(self, config: PreTrainedConfig, dsa: DsaConfig) -> None:
        """Raise what `from_dense` would, where the config alone tells: before weights are loaded."""

    def from_dense(self, dense: PreTrainedModel, dsa: DsaConfig) -> PreTrainedModel:
        """A DSA model with the weights of `dense` and a random indexer in each layer of `dsa.layers`."""
        raise NotImplementedError


@dataclass(frozen=True)
class GqaFamily(Family):
    """A family whose DSA classes are fulmen's own.

    Attributes:
        project: `(attention, x_BTC) -> q_BTHD, k_BTGD, v_BTGD` after bias or norm and before RoPE; takes the
            dense and the DSA attention module.
        config_class, model_class, causal_lm_class: the DSA classes.
        source_class: the stock language model.
    """

    project: Callable[[nn.Module, Tensor], tuple[Tensor, Tensor, Tensor]]
    config_class: type[PreTrainedConfig]
    model_class: type[PreTrainedModel]
    causal_lm_class: type[PreTrainedModel]
    source_class: type[PreTrainedModel]

    def from_dense(self, dense: PreTrainedModel, dsa: DsaConfig) -> PreTrainedModel:
        """As `Family.from_dense`; the weights are shared, not copied."""
        tied = dense.config.tie_word_embeddings and not has_own_head(dense)
        values = {**plain_config(dense.config), "dsa": dsa.to_dict(), "tie_word_embeddings": tied}
        config = self.config_class.from_dict(values)
        with torch.device("meta"):
            model = self.causal_lm_class(config)
        unmatched = model.load_state_dict(dense.state_dict(), assign=True, strict=False)
        assert all(".indexer." in key for key in unmatched.missing_keys), unmatched
        assert not unmatched.unexpected_keys, unmatched
        model.tie_weights()
        model.model.rotary_emb = copy.deepcopy(dense.model.rotary_emb)
        for layer in dsa.layers:
            attention = model.model.layers[layer].self_attn
            weight = attention.q_proj.weight
            attention.indexer.to_empty(device=weight.device).to(weight.dtype).apply(model._init_weights)
        model.generation_config = copy.deepcopy(dense.generation_config)
        return model.train(dense.training)


def has_own_head(model: PreTrainedModel) -> bool:
    """Whether the output layer has weights of its own. The config may call them tied where they are not."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return head is not None and head.weight is not embedding.weight


def plain_config(config: PreTrainedConfig) -> dict:
    """The config's values without what describes one checkpoint of one class."""
    values = config.to_dict()
    # Attention weights are never made: a source that returns them by default still converts.
    for key in ("model_type", "architectures", "auto_map", "quantization_config", "output_attentions"):
        values.pop(key, None)
    return values


def all_layers(config: PreTrainedConfig) -> list[int]:
    """Every layer has full attention."""
    return list(range(config.num_hidden_layers))


def layers_by_type(config: PreTrainedConfig) -> list[int]:
    """Layers that `config.layer_types` calls "full_attention" (the others slide)."""
    return [layer for layer, kind in enumerate(config.layer_types) if kind == "full_attention"]


def layers_unless_sliding(config: PreTrainedConfig) -> list[int]:
    """Every layer, or none where one `config.sliding_window` holds for all."""
    return all_layers(config) if config.sliding_window is None else []
