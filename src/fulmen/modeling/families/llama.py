"""Llama and its likes (SmolLM2, Yi, TinyLlama): RoPE over all dims, biases only if the config says."""

from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.models.llama.modeling_llama import LlamaAttention

from fulmen.modeling.family import all_layers
from fulmen.modeling.gqa.attention import DsaAttentionMixin, project_heads
from fulmen.modeling.gqa.family import gqa_family
from fulmen.modeling.gqa.model import DsaGenerationMixin, DsaModelMixin


class LlamaDsaConfig(LlamaConfig):
    """A Llama config with `dsa`, the dict of a `fulmen.config.DsaConfig`."""

    model_type = "llama_dsa"
    dsa: dict | None = None


class LlamaDsaAttention(DsaAttentionMixin, LlamaAttention):
    """q_proj, k_proj and v_proj, bias where `config.attention_bias`."""

    project = project_heads


class LlamaDsaModel(DsaModelMixin, LlamaModel):
    """LlamaModel with an indexer in its converted layers."""

    config_class = LlamaDsaConfig
    attention_class = LlamaDsaAttention


class LlamaDsaForCausalLM(DsaGenerationMixin, LlamaForCausalLM):  # type: ignore[misc]
    """LlamaForCausalLM with an indexer in its converted layers."""

    config_class = LlamaDsaConfig
    model_class = LlamaDsaModel


FAMILY = gqa_family(LlamaDsaForCausalLM, all_layers)
