"""Mistral without a sliding window (7B from v0.2 on, Nemo, Small)."""

from transformers import MistralConfig, MistralForCausalLM, MistralModel
from transformers.models.mistral.modeling_mistral import MistralAttention

from fulmen.modeling.family import layers_unless_sliding
from fulmen.modeling.gqa.attention import DsaAttentionMixin, project_heads
from fulmen.modeling.gqa.family import gqa_family
from fulmen.modeling.gqa.model import DsaGenerationMixin, DsaModelMixin


class MistralDsaConfig(MistralConfig):
    """A Mistral config with `dsa`, the dict of a `fulmen.config.DsaConfig`."""

    model_type = "mistral_dsa"
    dsa: dict | None = None


class MistralDsaAttention(DsaAttentionMixin, MistralAttention):
    """q_proj, k_proj and v_proj without bias."""

    project = project_heads


class MistralDsaModel(DsaModelMixin, MistralModel):
    """MistralModel with an indexer in its converted layers."""

    config_class = MistralDsaConfig
    attention_class = MistralDsaAttention


class MistralDsaForCausalLM(DsaGenerationMixin, MistralForCausalLM):  # type: ignore[misc]
    """MistralForCausalLM with an indexer in its converted layers."""

    config_class = MistralDsaConfig
    model_class = MistralDsaModel


FAMILY = gqa_family(MistralDsaForCausalLM, layers_unless_sliding)
