"""ERNIE 4.5: Llama's attention; RoPE turns neighbouring dims in pairs."""

from transformers import Ernie4_5ForCausalLM

from fulmen.modeling.gqa.attention import project_interleaved_heads
from fulmen.modeling.gqa.classes import dsa_classes
from fulmen.modeling.gqa.family import gqa_family

Ernie4_5DsaConfig, Ernie4_5DsaModel, Ernie4_5DsaForCausalLM = dsa_classes(
    __name__, Ernie4_5ForCausalLM, project=project_interleaved_heads
)
FAMILY = gqa_family(Ernie4_5DsaForCausalLM)
