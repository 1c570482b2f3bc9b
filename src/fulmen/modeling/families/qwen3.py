"""Qwen3: RMS norms on each query and key head; some layers may slide."""

from transformers import Qwen3ForCausalLM

from fulmen.modeling.gqa.attention import project_normed_heads
from fulmen.modeling.gqa.classes import dsa_classes
from fulmen.modeling.gqa.family import gqa_family

Qwen3DsaConfig, Qwen3DsaModel, Qwen3DsaForCausalLM = dsa_classes(
    __name__, Qwen3ForCausalLM, project=project_normed_heads
)
FAMILY = gqa_family(Qwen3DsaForCausalLM)
