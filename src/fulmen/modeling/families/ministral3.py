"""Ministral 3: Mistral's attention; queries beyond the first context are scaled by their position."""

from transformers import Ministral3ForCausalLM

from fulmen.modeling.gqa.attention import project_heads, scale_queries
from fulmen.modeling.gqa.classes import dsa_classes
from fulmen.modeling.gqa.family import gqa_family

Ministral3DsaConfig, Ministral3DsaModel, Ministral3DsaForCausalLM = dsa_classes(
    __name__, Ministral3ForCausalLM, project=project_heads, prepare=scale_queries
)
FAMILY = gqa_family(Ministral3DsaForCausalLM)
