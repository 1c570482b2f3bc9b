"""gpt-oss: every other layer slides and stays so; all have sinks, and biases in their projections."""

from transformers import GptOssForCausalLM

from fulmen.modeling.gqa.attention import project_heads
from fulmen.modeling.gqa.classes import dsa_classes
from fulmen.modeling.gqa.family import gqa_family

GptOssDsaConfig, GptOssDsaModel, GptOssDsaForCausalLM = dsa_classes(
    __name__, GptOssForCausalLM, project=project_heads
)
FAMILY = gqa_family(GptOssDsaForCausalLM)
