"""Qwen2 and Qwen2.5: biases on q, k and v; some layers may slide."""

from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Model
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention

from fulmen.modeling.family import layers_by_type
from fulmen.modeling.gqa.attention import DsaAttentionMixin, project_heads
from fulmen.modeling.gqa.family import gqa_family
from fulmen.modeling.gqa.model import DsaGenerationMixin, DsaModelMixin


class Qwen2DsaConfig(Qwen2Config):
    """A Qwen2 config with `dsa`, the dict of a `fulmen.config.DsaConfig`."""

    model_type = "qwen2_dsa"
    dsa: dict | None = None


class Qwen2DsaAttention(DsaAttentionMixin, Qwen2Attention):
    """q_proj, k_proj and v_proj, each with a bias."""

    project = project_heads


class Qwen2DsaModel(DsaModelMixin, Qwen2Model):
    """Qwen2Model with an indexer in its converted layers."""

    config_class = Qwen2DsaConfig
    attention_class = Qwen2DsaAttention


class Qwen2DsaForCausalLM(DsaGenerationMixin, Qwen2ForCausalLM):  # type: ignore[misc]
    """Qwen2ForCausalLM with an indexer in its converted layers."""

    config_class = Qwen2DsaConfig
    model_class = Qwen2DsaModel


FAMILY = gqa_family(Qwen2DsaForCausalLM, layers_by_type)
