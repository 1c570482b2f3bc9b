"""OLMo 3: OLMo 2's attention; three layers in four slide, with a rotary table of their own."""

from transformers import Olmo3ForCausalLM

from fulmen.modeling.gqa.attention import project_wholly_normed_heads
from fulmen.modeling.gqa.classes import dsa_classes
from fulmen.modeling.gqa.family import gqa_family

Olmo3DsaConfig, Olmo3DsaModel, Olmo3DsaForCausalLM = dsa_classes(
    __name__,
    Olmo3ForCausalLM,
    project=project_wholly_normed_heads,
    output_norm="post_attention_layernorm",
)
FAMILY = gqa_family(Olmo3DsaForCausalLM)
