"""Qwen3: RMS norms on each query and key head; some layers may slide."""

from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from fulmen.modeling.family import layers_by_type
from fulmen.modeling.gqa.attention import DsaAttentionMixin, project_normed_heads
from fulmen.modeling.gqa.family import gqa_family
from fulmen.modeling.gqa.model import DsaGenerationMixin, DsaModelMixin


class Qwen3DsaConfig(Qwen3Config):
    """A Qwen3 config with `dsa`, the dict of a `fulmen.config.DsaConfig`."""

    model_type = "qwen3_dsa"
    dsa: dict | None = None


class Qwen3DsaAttention(DsaAttentionMixin, Qwen3Attention):
    """q_proj and k_proj, each followed by a norm per head."""

    project = project_normed_heads


class Qwen3DsaModel(DsaModelMixin, Qwen3Model):
    """Qwen3Model with an indexer in its converted layers."""

    config_class = Qwen3DsaConfig
    attention_class = Qwen3DsaAttention


class Qwen3DsaForCausalLM(DsaGenerationMixin, Qwen3ForCausalLM):  # type: ignore[misc]
    """Qwen3ForCausalLM with an indexer in its converted layers."""

    config_class = Qwen3DsaConfig
    model_class = Qwen3DsaModel


FAMILY = gqa_family(Qwen3DsaForCausalLM, layers_by_type)
