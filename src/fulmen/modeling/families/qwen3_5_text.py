"""Qwen3.5's text models: Qwen3-Next's layers, plain MLPs; RoPE in three parts, which text has alike."""

from transformers import Qwen3_5ForCausalLM

from fulmen.modeling.gqa.attention import project_gated_heads
from fulmen.modeling.gqa.classes import dsa_classes
from fulmen.modeling.gqa.family import gqa_family

Qwen3_5DsaConfig, Qwen3_5DsaModel, Qwen3_5DsaForCausalLM = dsa_classes(
    __name__, Qwen3_5ForCausalLM, project=project_gated_heads
)
FAMILY = gqa_family(Qwen3_5DsaForCausalLM, gated=True)
