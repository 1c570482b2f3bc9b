"""HunYuan (0.5B to 7B): Llama's attention, whose queries and keys are normed per head after RoPE."""

from transformers import HunYuanDenseV1ForCausalLM

from fulmen.modeling.gqa.attention import norm_turned_heads, project_heads
from fulmen.modeling.gqa.classes import dsa_classes
from fulmen.modeling.gqa.family import gqa_family

HunYuanDenseV1DsaConfig, HunYuanDenseV1DsaModel, HunYuanDenseV1DsaForCausalLM = dsa_classes(
    __name__, HunYuanDenseV1ForCausalLM, project=project_heads, prepare=norm_turned_heads
)
FAMILY = gqa_family(HunYuanDenseV1DsaForCausalLM)
