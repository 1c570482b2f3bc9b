"""Qwen3-MoE (30B-A3B, 235B-A22B, Coder): Qwen3's attention; experts in place of the MLP."""

from transformers import Qwen3MoeForCausalLM

from fulmen.modeling.gqa.attention import project_normed_heads
from fulmen.modeling.gqa.classes import dsa_classes
from fulmen.modeling.gqa.family import gqa_family

Qwen3MoeDsaConfig, Qwen3MoeDsaModel, Qwen3MoeDsaForCausalLM = dsa_classes(
    __name__, Qwen3MoeForCausalLM, project=project_normed_heads
)
FAMILY = gqa_family(Qwen3MoeDsaForCausalLM)
