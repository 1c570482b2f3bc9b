"""Qwen3-Next: three layers in four have linear attention and stay so; the others a gate on the output."""

from transformers import Qwen3NextForCausalLM

from fulmen.modeling.gqa.attention import project_gated_heads
from fulmen.modeling.gqa.classes import dsa_classes
from fulmen.modeling.gqa.family import gqa_family

Qwen3NextDsaConfig, Qwen3NextDsaModel, Qwen3NextDsaForCausalLM = dsa_classes(
    __name__, Qwen3NextForCausalLM, project=project_gated_heads
)
FAMILY = gqa_family(Qwen3NextDsaForCausalLM, gated=True)
