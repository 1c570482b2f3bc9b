"""Gemma 3's text models: one layer in six sees all, the others the last 512 or 1,024 tokens, and stay so.

Full and sliding layers have rotary tables of their own; a converted layer is given the full layers'.
"""

from transformers import Gemma3ForCausalLM, PreTrainedConfig

from fulmen.errors import UnsupportedModelError
from fulmen.modeling.gqa.attention import project_normed_heads
from fulmen.modeling.gqa.classes import dsa_classes
from fulmen.modeling.gqa.family import gqa_family


def require_plain_gemma3(config: PreTrainedConfig) -> None:
    """Raise UnsupportedModelError for what a config may ask for and no Gemma 3 language model has:
    attention that is not causal, or capped logits.
    """
    for key in ("use_bidirectional_attention", "attn_logit_softcapping", "final_logit_softcapping"):
        if value := getattr(config, key, None):
            raise UnsupportedModelError(
                f"model_type {config.model_type!r} with {key}={value} is not supported; "
                "only causal attention without caps on logits is, as all Gemma 3 language models have it"
            )


Gemma3DsaConfig, Gemma3DsaModel, Gemma3DsaForCausalLM = dsa_classes(
    __name__,
    Gemma3ForCausalLM,
    project=project_normed_heads,
    output_norm="post_attention_layernorm",
    require=require_plain_gemma3,
)
FAMILY = gqa_family(Gemma3DsaForCausalLM)
