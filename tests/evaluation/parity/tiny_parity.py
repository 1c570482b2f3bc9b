"""A tiny random DSA model, texts and needles for the tests of this folder."""

import torch
from transformers import DeepseekV32Config, DeepseekV32ForCausalLM, LlamaConfig, LlamaForCausalLM

from fulmen.config import DsaConfig
from fulmen.data import TokenSequence
from fulmen.evaluation.parity.needles import NeedleSample
from fulmen.modeling.families import family_for_type

VOCAB, LENGTH, TOPK, LAYERS = 97, 80, 12, 2


def tiny_dense():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def tiny_dsa(dense, topk=TOPK):
    """The dense model with random indexers; it shares the weights."""
    torch.manual_seed(1)
    return family_for_type("llama").from_dense(dense, DsaConfig(topk, 4, 2, 8, tuple(range(LAYERS))))


def tiny_v32(topk=TOPK):
    torch.manual_seed(0)
    config = DeepseekV32Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=LAYERS,
        first_k_dense_replace=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=2,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        index_n_heads=2,
        index_head_dim=16,
        index_topk=topk,
        initializer_range=0.3,
    )
    return DeepseekV32ForCausalLM(config).eval()


def random_ids(length, seed=0):
    return torch.randint(2, VOCAB, (length,), generator=torch.Generator().manual_seed(seed))


def tiny_windows(count=4, length=LENGTH):
    """Code and prose in turns."""
    kinds = ("code", "prose")
    return [TokenSequence((f"text {n}",), kinds[n % 2], random_ids(length, n), (0,)) for n in range(count)]


def tiny_needles():
    """Per length and depth two with a text of their own, and two that ask about one text."""
    samples = []
    for length in (40, 60):
        for depth in (0.1, 0.7):
            for seed in range(2):
                answer_ids = random_ids(1, seed + 50)
                samples.append(NeedleSample(random_ids(length, seed), answer_ids, "1", depth, length, 1))
                shared_ids = torch.cat([random_ids(length - 6, int(10 * depth)), random_ids(6, seed)])
                samples.append(
                    NeedleSample(shared_ids, answer_ids, "1", depth, length, 3, text=int(10 * depth))
                )
    return sorted(samples, key=lambda sample: (sample.n_keys, sample.length))
