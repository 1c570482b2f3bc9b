"""Llama and its likes (SmolLM2, Yi, TinyLlama): RoPE over all dims, biases only if the config says."""

from transformers import LlamaForCausalLM

from fulmen.modeling.gqa.attention import project_heads
from fulmen.modeling.gqa.classes import dsa_classes
from fulmen.modeling.gqa.family import gqa_family

LlamaDsaConfig, LlamaDsaModel, LlamaDsaForCausalLM = dsa_classes(
    __name__, LlamaForCausalLM, project=project_heads
)
FAMILY = gqa_family(LlamaDsaForCausalLM)
