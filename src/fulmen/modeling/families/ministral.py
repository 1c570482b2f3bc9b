"""Ministral 8B: Mistral's attention; some layers slide."""

from transformers import MinistralForCausalLM

from fulmen.modeling.gqa.attention import project_heads
from fulmen.modeling.gqa.classes import dsa_classes
from fulmen.modeling.gqa.family import gqa_family

MinistralDsaConfig, MinistralDsaModel, MinistralDsaForCausalLM = dsa_classes(
    __name__, MinistralForCausalLM, project=project_heads
)
FAMILY = gqa_family(MinistralDsaForCausalLM)
