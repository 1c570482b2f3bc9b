"""Tiny random models of every GQA family, dense and converted, for the tests of this folder."""

from functools import cache

import torch
from transformers import (
    DeepseekV32Config,
    DeepseekV32ForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from fulmen.config import DsaConfig
from fulmen.modeling.families import family_for_type
from fulmen.modeling.weights import keep_caps

VOCAB = 97
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LAST_LAYER_SLIDES = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2}
# Neither the width of a head nor one rotary table says what a layer of these does.
GEMMA3 = {
    "head_dim": 24,
    "query_pre_attn_scalar": 10,
    "sliding_window": 7,
    "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
    },
}
# Caps that bend the logits of both; every other layer slides.
GEMMA2 = {
    "head_dim": 24,
    "query_pre_attn_scalar": 10,
    "sliding_window": 7,
    "attn_logit_softcapping": 3.0,
    "final_logit_softcapping": 10.0,
    "layer_types": ["full_attention", "sliding_attention", "full_attention"],
}
# Sinks, experts, and a window in every other layer.
GPT_OSS = {
    "head_dim": 16,
    "sliding_window": 7,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
CONFIGS = {
    "llama": lambda: LlamaConfig(**SHAPE),
    "llama3-rope": lambda: LlamaConfig(**SHAPE, rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(**SHAPE),
    "qwen2-mixed": lambda: Qwen2Config(**SHAPE, **LAST_LAYER_SLIDES),
    "qwen3": lambda: Qwen3Config(**SHAPE, head_dim=24),
    "gemma3": lambda: Gemma3TextConfig(**{**SHAPE, "initializer_range": 0.1}, **GEMMA3),
    "mistral": lambda: MistralConfig(**SHAPE, sliding_window=None),
    "gemma2": lambda: Gemma2Config(**{**SHAPE, "initializer_range": 0.1}, **GEMMA2),
    "gpt_oss": lambda: GptOssConfig(**{**SHAPE, "initializer_range": 0.1}, **GPT_OSS),
}
FAMILIES = list(CONFIGS)


def make_dense(name: str = "llama", dtype: torch.dtype = torch.float32, **changes) -> PreTrainedModel:
    """A stock model with random weights, biases and norms included; always the same one.

    `changes`: of its config.
    """
    torch.manual_seed(0)
    config = CONFIGS[name]()
    config.update(changes)
    model = family_for_type(config.model_type).source_class(config)
    keep_caps(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                # Around what it begins with: 1, 0 for biases and for norms that multiply by 1 + weight.
                parameter.normal_(parameter.mean().item(), 0.3)
            # Not model.to(dtype), which would round the RoPE table too.
            parameter.data = parameter.data.to(dtype)
    return model.eval()


def make_dsa(
    dense: PreTrainedModel, topk: int = 8, heads: int = 4, kv_heads: int = 2, head_dim: int = 8, layers=None
) -> PreTrainedModel:
    """The dense model with random indexers; it shares the weights."""
    family = family_for_type(dense.config.model_type)
    layers = family.full_attention_layers(dense.config) if layers is None else layers
    torch.manual_seed(1)
    return family.from_dense(dense, DsaConfig(topk, heads, kv_heads, head_dim, tuple(layers)))


def make_v32() -> PreTrainedModel:
    """Transformers' own DSA model with random weights."""
    torch.manual_seed(0)
    config = DeepseekV32Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        first_k_dense_replace=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        index_n_heads=2,
        index_head_dim=16,
        index_topk=4,
        initializer_range=0.3,
    )
    return DeepseekV32ForCausalLM(config).eval()


@cache
def pair(name: str, topk: int) -> tuple[PreTrainedModel, PreTrainedModel]:
    """(dense, converted) in float32, made once."""
    dense = make_dense(name)
    return dense, make_dsa(dense, topk)


def random_ids(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """Token ids without the padding id."""
    return torch.randint(2, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))
