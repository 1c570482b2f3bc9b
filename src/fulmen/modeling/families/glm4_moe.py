"""GLM-4.5, 4.6 and 4.7: RoPE turns half of the dims; norms per head where the config says; experts."""

from transformers import Glm4MoeForCausalLM

from fulmen.modeling.gqa.attention import project_heads_normed_if_asked
from fulmen.modeling.gqa.classes import dsa_classes
from fulmen.modeling.gqa.family import gqa_family

Glm4MoeDsaConfig, Glm4MoeDsaModel, Glm4MoeDsaForCausalLM = dsa_classes(
    __name__, Glm4MoeForCausalLM, project=project_heads_normed_if_asked
)
FAMILY = gqa_family(Glm4MoeDsaForCausalLM)
