"""Granite 3 MoE: Granite's attention and multiples; experts in place of the MLP."""

from transformers import GraniteMoeForCausalLM

from fulmen.modeling.gqa.attention import project_heads
from fulmen.modeling.gqa.classes import dsa_classes
from fulmen.modeling.gqa.family import gqa_family

GraniteMoeDsaConfig, GraniteMoeDsaModel, GraniteMoeDsaForCausalLM = dsa_classes(
    __name__, GraniteMoeForCausalLM, project=project_heads
)
FAMILY = gqa_family(GraniteMoeDsaForCausalLM)
