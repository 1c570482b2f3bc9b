"""Seed-OSS: Llama's attention with biases on q, k and v."""

from transformers import SeedOssForCausalLM

from fulmen.modeling.gqa.attention import project_heads
from fulmen.modeling.gqa.classes import dsa_classes
from fulmen.modeling.gqa.family import gqa_family

SeedOssDsaConfig, SeedOssDsaModel, SeedOssDsaForCausalLM = dsa_classes(
    __name__, SeedOssForCausalLM, project=project_heads
)
FAMILY = gqa_family(SeedOssDsaForCausalLM)
