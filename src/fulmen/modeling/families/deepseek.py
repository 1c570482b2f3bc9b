"""DeepSeek-V2 and V3, GLM-4.7-Flash and Kimi K2, whose DSA form is Transformers' own `deepseek_v32`; GLM-5,
which has DSA of itself.
"""

from fulmen.modeling.family import all_layers
from fulmen.modeling.mla.convert import MLA_DSA_TYPES, MLA_SOURCE_TYPES
from fulmen.modeling.mla.family import MlaFamily

FAMILY = MlaFamily(
    source_types=MLA_SOURCE_TYPES,
    dsa_types=MLA_DSA_TYPES,
    serving_classes=("DeepseekV32ForCausalLM", "GlmMoeDsaForCausalLM"),
    full_attention_layers=all_layers,
)
