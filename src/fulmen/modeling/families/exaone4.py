"""EXAONE 4: Qwen3's norms on heads, OLMo 2's on layers; where some layers slide, the others have no RoPE."""

from transformers import Exaone4ForCausalLM, PreTrainedConfig

from fulmen.modeling.gqa.attention import project_normed_heads
from fulmen.modeling.gqa.classes import dsa_classes
from fulmen.modeling.gqa.family import gqa_family


def turns_unless_others_slide(config: PreTrainedConfig, layer: int) -> bool:
    """RoPE is for sliding layers, and for all where none slides."""
    return config.sliding_window is None or config.layer_types[layer] == "sliding_attention"


Exaone4DsaConfig, Exaone4DsaModel, Exaone4DsaForCausalLM = dsa_classes(
    __name__,
    Exaone4ForCausalLM,
    project=project_normed_heads,
    output_norm="post_attention_layernorm",
    turns=turns_unless_others_slide,
)
FAMILY = gqa_family(Exaone4DsaForCausalLM)
