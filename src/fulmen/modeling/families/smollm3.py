"""SmolLM3: Llama's attention; one layer in four has no RoPE."""

from transformers import PreTrainedConfig, SmolLM3ForCausalLM

from fulmen.modeling.gqa.attention import project_heads
from fulmen.modeling.gqa.classes import dsa_classes
from fulmen.modeling.gqa.family import gqa_family


def turns_where_listed(config: PreTrainedConfig, layer: int) -> bool:
    """`no_rope_layers` has a 1 for a layer with RoPE."""
    return bool(config.no_rope_layers[layer])


SmolLM3DsaConfig, SmolLM3DsaModel, SmolLM3DsaForCausalLM = dsa_classes(
    __name__,
    SmolLM3ForCausalLM,
    project=project_heads,
    turns=turns_where_listed,
)
FAMILY = gqa_family(SmolLM3DsaForCausalLM)
