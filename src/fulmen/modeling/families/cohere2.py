"""Command R7B and Command A: three layers in four slide; those that see all have no RoPE."""

from transformers import Cohere2ForCausalLM, PreTrainedConfig

from fulmen.modeling.gqa.attention import project_heads
from fulmen.modeling.gqa.classes import dsa_classes
from fulmen.modeling.gqa.family import gqa_family


def turns_while_sliding(config: PreTrainedConfig, layer: int) -> bool:
    """RoPE is for sliding layers alone."""
    return config.layer_types[layer] == "sliding_attention"


Cohere2DsaConfig, Cohere2DsaModel, Cohere2DsaForCausalLM = dsa_classes(
    __name__,
    Cohere2ForCausalLM,
    project=project_heads,
    turns=turns_while_sliding,
)
FAMILY = gqa_family(Cohere2DsaForCausalLM)
