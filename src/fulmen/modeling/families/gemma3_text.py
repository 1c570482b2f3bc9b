"""Gemma 3's text models: one layer in six sees all, the others the last 512 or 1,024 tokens, and stay so.

Full and sliding layers have rotary tables of their own; a converted layer is given the full layers'.
"""

from typing import Any

from torch import Tensor
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, Gemma3TextModel, PreTrainedConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3Attention

from fulmen.errors import UnsupportedModelError
from fulmen.modeling.family import layers_by_type
from fulmen.modeling.gqa.attention import DsaAttentionMixin, project_normed_heads
from fulmen.modeling.gqa.family import gqa_family
from fulmen.modeling.gqa.model import DsaGenerationMixin, DsaModelMixin


def gemma3_full_layers(config: Any) -> list[int]:
    """`layers_by_type`. Raises UnsupportedModelError for attention that is not causal, or capped logits."""
    require_plain_gemma3(config)
    return layers_by_type(config)


def require_plain_gemma3(config: PreTrainedConfig) -> None:
    """Raise UnsupportedModelError for what a config may ask for and no Gemma 3 language model has."""
    for key in ("use_bidirectional_attention", "attn_logit_softcapping", "final_logit_softcapping"):
        if value := getattr(config, key, None):
            raise UnsupportedModelError(
                f"model_type {config.model_type!r} with {key}={value} is not supported; "
                "only causal attention without caps on logits is, as all Gemma 3 language models have it"
            )


class Gemma3DsaConfig(Gemma3TextConfig):
    """A Gemma 3 text config with `dsa`, the dict of a `fulmen.config.DsaConfig`."""

    model_type = "gemma3_text_dsa"
    dsa: dict | None = None


class Gemma3DsaAttention(DsaAttentionMixin, Gemma3Attention):  # type: ignore[misc]
    """q_proj and k_proj, each followed by a norm per head; the layer norms the output too."""

    project = project_normed_heads
    output_norm_name = "post_attention_layernorm"

    def output_weight(self) -> Tensor:
        """With the norm's gain; what the norm divides by is one number a token."""
        gain_C1 = 1 + self.output_norm.weight.float()[:, None]
        return (gain_C1 * self.o_proj.weight).to(self.o_proj.weight.dtype)


class Gemma3DsaModel(DsaModelMixin, Gemma3TextModel):
    """Gemma3TextModel with an indexer in its converted layers."""

    config_class = Gemma3DsaConfig
    attention_class = Gemma3DsaAttention

    def __init__(self, config: PreTrainedConfig) -> None:
        require_plain_gemma3(config)
        super().__init__(config)


class Gemma3DsaForCausalLM(DsaGenerationMixin, Gemma3ForCausalLM):  # type: ignore[misc]
    """Gemma3ForCausalLM with an indexer in its converted layers."""

    config_class = Gemma3DsaConfig
    model_class = Gemma3DsaModel


FAMILY = gqa_family(Gemma3DsaForCausalLM, gemma3_full_layers)
