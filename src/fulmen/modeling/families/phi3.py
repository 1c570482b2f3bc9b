"""Phi-3, 3.5 and 4, mini models too: one projection for q, k and v; RoPE may turn a part of the dims."""

from transformers import Phi3ForCausalLM

from fulmen.modeling.gqa.attention import project_fused_heads
from fulmen.modeling.gqa.classes import dsa_classes
from fulmen.modeling.gqa.family import gqa_family

Phi3DsaConfig, Phi3DsaModel, Phi3DsaForCausalLM = dsa_classes(
    __name__, Phi3ForCausalLM, project=project_fused_heads
)
FAMILY = gqa_family(Phi3DsaForCausalLM)
