"""Tiny random models of every GQA family, dense and converted, for the tests of this folder."""

from functools import cache

import torch
from transformers import (
    AutoConfig,
    DeepseekV32Config,
    DeepseekV32ForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
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
FULL, SLIDING = "full_attention", "sliding_attention"
SLIDES_BETWEEN = {"sliding_window": 7, "layer_types": [FULL, SLIDING, FULL]}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 40}
MULTIPLES = {"residual_multiplier": 0.4, "embedding_multiplier": 3.0, "logits_scaling": 2.0}
PARTIAL = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75}
GLM4_MOE = {"use_qk_norm": True, "attention_bias": True, "n_routed_experts": 4, "first_k_dense_replace": 1}
QWEN2_MOE = {"num_experts": 4, "shared_expert_intermediate_size": 56, "use_sliding_window": True}
# Queries are scaled by their position, in three steps up to 24 tokens.
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 64.0,
    "original_max_position_embeddings": 8,
    "llama_4_scaling_beta": 0.5,
}
# Every other layer has linear attention.
HYBRID = {
    "initializer_range": 0.1,
    "head_dim": 24,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", FULL, "linear_attention", FULL],
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
}
HYBRID_EXPERTS = {"num_experts": 4, "shared_expert_intermediate_size": 56, **EXPERTS, **HYBRID}
# Model type, and what is not as in SHAPE.
CONFIGS: dict[str, tuple[str, dict]] = {
    "llama": ("llama", {}),
    "llama3-rope": ("llama", {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", {}),
    "qwen2-mixed": ("qwen2", LAST_LAYER_SLIDES),
    "qwen3": ("qwen3", {"head_dim": 24}),
    "gemma3": ("gemma3_text", {"initializer_range": 0.1, **GEMMA3}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen3-moe": ("qwen3_moe", {"head_dim": 24, "num_experts": 6, "mlp_only_layers": [1], **EXPERTS}),
    "mixtral": ("mixtral", {"sliding_window": None, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2-moe": ("qwen2_moe", {**QWEN2_MOE, **EXPERTS, **SLIDES_BETWEEN}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", {**SLIDES_BETWEEN, "rope_parameters": GEMMA3["rope_parameters"]}),
    "granite": ("granite", {"attention_multiplier": 0.3, **MULTIPLES}),
    "granite-moe": ("granitemoe", {"attention_multiplier": 0.3, "num_local_experts": 4, **MULTIPLES}),
    "starcoder2": ("starcoder2", {"tie_word_embeddings": True}),
    "seed-oss": ("seed_oss", {"head_dim": 24, "attention_dropout": 0.0, "residual_dropout": 0.0}),
    "ministral": ("ministral", {"head_dim": 24, **SLIDES_BETWEEN}),
    # A window that no text of its context fills.
    "phi3": ("phi3", {"rope_parameters": PARTIAL, "sliding_window": 512}),
    "exaone4": ("exaone4", {"sliding_window": None, "layer_types": [FULL] * 3}),
    "exaone4-mixed": ("exaone4", SLIDES_BETWEEN),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0, 1], "initializer_range": 0.15}),
    "glm4": ("glm4", {"head_dim": 24, "eos_token_id": 2, "pad_token_id": 0}),
    "glm4-moe": ("glm4_moe", {"head_dim": 24, **GLM4_MOE, **EXPERTS}),
    "cohere2": ("cohere2", SLIDES_BETWEEN),
    "ernie4-5": ("ernie4_5", {"head_dim": 24}),
    "gemma2": ("gemma2", {"initializer_range": 0.1, **GEMMA2}),
    "qwen3-next": ("qwen3_next", {"mlp_only_layers": [1], **HYBRID_EXPERTS}),
    "qwen3-5": ("qwen3_5_text", HYBRID),
    "qwen3-5-moe": ("qwen3_5_moe_text", HYBRID_EXPERTS),
    "ministral3": ("ministral3", {"head_dim": 24, "rope_parameters": YARN}),
    "hunyuan": ("hunyuan_v1_dense", {"head_dim": 24}),
    "gpt-oss": ("gpt_oss", {"initializer_range": 0.1, **GPT_OSS}),
}
# Put to every test: each has something that those before it lack (OLMo 3: one norm for all heads; SmolLM3: a
# layer without RoPE; GLM-4: RoPE of neighbours, in a part of the dims; Granite MoE: multiples, experts;
# Gemma 2: capped logits; Qwen3-Next: a gate, layers with linear attention; gpt-oss: sinks, a rotary table
# with each angle once).
FAMILIES = [
    *("llama", "llama3-rope", "qwen2-mixed", "qwen3", "gemma3"),
    *("olmo3", "smollm3", "glm4", "granite-moe", "gemma2", "qwen3-next", "gpt-oss"),
]
# Of the same parts; tests/modeling/gqa/test_more_families.py has what they are put to.
MORE = [name for name in CONFIGS if name not in FAMILIES]


def make_config(name: str) -> PreTrainedConfig:
    """The stock config of a tiny model."""
    model_type, changes = CONFIGS[name]
    return AutoConfig.for_model(model_type, **{**SHAPE, **changes})


def make_dense(name: str = "llama", dtype: torch.dtype = torch.float32, **changes) -> PreTrainedModel:
    """A stock model with random weights, biases and norms included; always the same one.

    `changes`: of its config.
    """
    torch.manual_seed(0)
    config = make_config(name)
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
