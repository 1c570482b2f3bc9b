"""Qwen3.5's text models with experts: the layers of Qwen3-Next."""

from transformers import Qwen3_5MoeForCausalLM

from fulmen.modeling.gqa.attention import project_gated_heads
from fulmen.modeling.gqa.classes import dsa_classes
from fulmen.modeling.gqa.family import gqa_family

Qwen3_5MoeDsaConfig, Qwen3_5MoeDsaModel, Qwen3_5MoeDsaForCausalLM = dsa_classes(
    __name__, Qwen3_5MoeForCausalLM, project=project_gated_heads
)
FAMILY = gqa_family(Qwen3_5MoeDsaForCausalLM, gated=True)
