"""Qwen2-MoE (1.5 and 2): Qwen2's attention; experts, some of them shared."""

from transformers import Qwen2MoeForCausalLM

from fulmen.modeling.gqa.attention import project_heads
from fulmen.modeling.gqa.classes import dsa_classes
from fulmen.modeling.gqa.family import gqa_family

Qwen2MoeDsaConfig, Qwen2MoeDsaModel, Qwen2MoeDsaForCausalLM = dsa_classes(
    __name__, Qwen2MoeForCausalLM, project=project_heads
)
FAMILY = gqa_family(Qwen2MoeDsaForCausalLM)
