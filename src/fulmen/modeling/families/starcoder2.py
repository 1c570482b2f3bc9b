"""StarCoder2 without a sliding window: Llama's attention with biases on all projections."""

from transformers import Starcoder2ForCausalLM

from fulmen.modeling.gqa.attention import project_heads
from fulmen.modeling.gqa.classes import dsa_classes
from fulmen.modeling.gqa.family import gqa_family

Starcoder2DsaConfig, Starcoder2DsaModel, Starcoder2DsaForCausalLM = dsa_classes(
    __name__, Starcoder2ForCausalLM, project=project_heads
)
FAMILY = gqa_family(Starcoder2DsaForCausalLM, mlp_matrices=2)
