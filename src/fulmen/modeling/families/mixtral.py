"""Mixtral: Mistral's attention; experts in place of the MLP."""

from transformers import MixtralForCausalLM

from fulmen.modeling.gqa.attention import project_heads
from fulmen.modeling.gqa.classes import dsa_classes
from fulmen.modeling.gqa.family import gqa_family

MixtralDsaConfig, MixtralDsaModel, MixtralDsaForCausalLM = dsa_classes(
    __name__, MixtralForCausalLM, project=project_heads
)
FAMILY = gqa_family(MixtralDsaForCausalLM)
