"""Gemma 2: every other layer slides and stays so; the logits of all are capped (arXiv 2408.00118)."""

from transformers import Gemma2ForCausalLM

from fulmen.modeling.gqa.attention import project_heads
from fulmen.modeling.gqa.classes import dsa_classes
from fulmen.modeling.gqa.family import gqa_family
from fulmen.modeling.gqa.model import require_causal

Gemma2DsaConfig, Gemma2DsaModel, Gemma2DsaForCausalLM = dsa_classes(
    __name__,
    Gemma2ForCausalLM,
    project=project_heads,
    output_norm="post_attention_layernorm",
    require=require_causal,
)
FAMILY = gqa_family(Gemma2DsaForCausalLM)
