"""Mistral without a sliding window (7B from v0.2 on, Nemo, Small)."""

from transformers import MistralForCausalLM

from fulmen.modeling.gqa.attention import project_heads
from fulmen.modeling.gqa.classes import dsa_classes
from fulmen.modeling.gqa.family import gqa_family

MistralDsaConfig, MistralDsaModel, MistralDsaForCausalLM = dsa_classes(
    __name__, MistralForCausalLM, project=project_heads
)
FAMILY = gqa_family(MistralDsaForCausalLM)
