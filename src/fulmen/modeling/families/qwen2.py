"""Qwen2 and Qwen2.5: biases on q, k and v; some layers may slide."""

from transformers import Qwen2ForCausalLM

from fulmen.modeling.gqa.attention import project_heads
from fulmen.modeling.gqa.classes import dsa_classes
from fulmen.modeling.gqa.family import gqa_family

Qwen2DsaConfig, Qwen2DsaModel, Qwen2DsaForCausalLM = dsa_classes(
    __name__, Qwen2ForCausalLM, project=project_heads
)
FAMILY = gqa_family(Qwen2DsaForCausalLM)
