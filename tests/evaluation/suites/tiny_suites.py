"""A tiny random model with one token per byte, for the suites."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.data.byte_tokenizer import byte_tokenizer

VOCAB = len(byte_tokenizer())


def tiny_llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()
