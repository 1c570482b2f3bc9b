"""gpt-oss: every other layer slides and stays so; all have sinks, and biases in their projections.

Its rotary table has each angle once, where fulmen's (and all others) have it for both dims of a pair.
"""

from typing import Any

import torch
from torch import nn
from transformers import GptOssConfig, GptOssForCausalLM, GptOssModel, PreTrainedConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention

from fulmen.modeling.family import layers_by_type
from fulmen.modeling.gqa.attention import DsaAttentionMixin, project_heads
from fulmen.modeling.gqa.family import gqa_family
from fulmen.modeling.gqa.model import DsaGenerationMixin, DsaModelMixin


class GptOssDsaConfig(GptOssConfig):
    """A gpt-oss config with `dsa`, the dict of a `fulmen.config.DsaConfig`."""

    model_type = "gpt_oss_dsa"
    dsa: dict | None = None


class GptOssDsaAttention(DsaAttentionMixin, GptOssAttention):  # type: ignore[misc]
    """The stock attention's sinks are those of its DSA."""

    project = project_heads

    def __init__(self, config: PreTrainedConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.register_forward_pre_hook(with_whole_tables, with_kwargs=True)


def with_whole_tables(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Before a converted layer: its rotary table with both halves."""
    tables = tuple(torch.cat((table_BTP, table_BTP), -1) for table_BTP in kwargs["position_embeddings"])
    return args, {**kwargs, "position_embeddings": tables}


class GptOssDsaModel(DsaModelMixin, GptOssModel):
    """GptOssModel with an indexer in its converted layers."""

    config_class = GptOssDsaConfig
    attention_class = GptOssDsaAttention


class GptOssDsaForCausalLM(DsaGenerationMixin, GptOssForCausalLM):  # type: ignore[misc]
    """GptOssForCausalLM with an indexer in its converted layers."""

    config_class = GptOssDsaConfig
    model_class = GptOssDsaModel

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        # As in the stock class: of the router's loss, if asked for.
        self.router_aux_loss_coef = config.router_aux_loss_coef
        self.num_experts = config.num_local_experts
        self.num_experts_per_tok = config.num_experts_per_tok


FAMILY = gqa_family(GptOssDsaForCausalLM, layers_by_type)
