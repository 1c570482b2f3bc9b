"""GLM-4 (0414): RoPE turns half of the dims, neighbours in pairs; a layer norms what its attention adds."""

from transformers import Glm4ForCausalLM

from fulmen.modeling.gqa.attention import project_interleaved_heads
from fulmen.modeling.gqa.classes import dsa_classes
from fulmen.modeling.gqa.family import gqa_family

Glm4DsaConfig, Glm4DsaModel, Glm4DsaForCausalLM = dsa_classes(
    __name__,
    Glm4ForCausalLM,
    project=project_interleaved_heads,
    output_norm="post_self_attn_layernorm",
)
FAMILY = gqa_family(Glm4DsaForCausalLM)
