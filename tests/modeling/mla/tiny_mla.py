"""Tiny random MLA models for the tests of this folder."""

from typing import Any

import torch
from torch import Tensor
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DeepseekV32Config,
    DeepseekV32ForCausalLM,
    Glm4MoeLiteConfig,
    Glm4MoeLiteForCausalLM,
    GlmMoeDsaConfig,
    GlmMoeDsaForCausalLM,
    PreTrainedModel,
)

MLA_VOCAB = 64
MLA_SHAPE = {
    "vocab_size": MLA_VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "kv_lora_rank": 32,
    "q_lora_rank": 48,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 512,
    "pad_token_id": None,
}
INDEX_SHAPE = {"index_topk": 8, "index_n_heads": 8, "index_head_dim": 16}
MLA_CLASSES = {
    "v2": (DeepseekV2Config, DeepseekV2ForCausalLM),
    "v3": (DeepseekV3Config, DeepseekV3ForCausalLM),
    "lite": (Glm4MoeLiteConfig, Glm4MoeLiteForCausalLM),
    "v32": (DeepseekV32Config, DeepseekV32ForCausalLM),
    "glm": (GlmMoeDsaConfig, GlmMoeDsaForCausalLM),
}


def make_mla(kind: str, seed: int = 0, attn: str = "sdpa", **changes: Any) -> PreTrainedModel:
    """A stock model with random weights, norms and biases included; fp32, the same for the same arguments."""
    config_class, model_class = MLA_CLASSES[kind]
    shape = {**MLA_SHAPE, **(INDEX_SHAPE if kind in ("v32", "glm") else {}), **changes}
    model = model_class._from_config(config_class(**shape), attn_implementation=attn)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            is_norm = "norm" in name and name.endswith("weight")
            spread = 0.2 if tensor.ndim == 1 else 1.0 if "embed" in name else tensor.shape[-1] ** -0.5
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * spread + float(is_norm))
    return model.eval()


def mla_ids(batch: int, length: int, seed: int = 0) -> Tensor:
    """Random token ids."""
    return torch.randint(0, MLA_VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))
