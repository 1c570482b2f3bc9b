"""Granite 3: Llama's attention, its logits times `attention_multiplier`; a layer adds a multiple."""

from transformers import GraniteForCausalLM

from fulmen.modeling.gqa.attention import project_heads
from fulmen.modeling.gqa.classes import dsa_classes
from fulmen.modeling.gqa.family import gqa_family

GraniteDsaConfig, GraniteDsaModel, GraniteDsaForCausalLM = dsa_classes(
    __name__, GraniteForCausalLM, project=project_heads
)
FAMILY = gqa_family(GraniteDsaForCausalLM)
