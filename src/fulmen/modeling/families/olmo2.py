"""OLMo 2: norms over all query and all key heads at once; a layer norms what it adds, not what it reads."""

from transformers import Olmo2ForCausalLM

from fulmen.modeling.gqa.attention import project_wholly_normed_heads
from fulmen.modeling.gqa.classes import dsa_classes
from fulmen.modeling.gqa.family import gqa_family

Olmo2DsaConfig, Olmo2DsaModel, Olmo2DsaForCausalLM = dsa_classes(
    __name__,
    Olmo2ForCausalLM,
    project=project_wholly_normed_heads,
    output_norm="post_attention_layernorm",
)
FAMILY = gqa_family(Olmo2DsaForCausalLM)
