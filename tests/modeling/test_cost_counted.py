"""The formulas of cost against what real models do: FLOPs counted by torch, bytes of the tensors they read.

The specification of the operations reads for each query exactly its keys, as the formulas count them.
"""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DeepseekV32Config, GlmMoeDsaConfig, LlamaConfig, Qwen3Config

from fulmen.modeling.cost import (
    decode_cost,
    head_weights,
    indexer_cost,
    layer_weights,
    prefill_cost,
    token_bytes,
)
from fulmen.modeling.families import dsa_of
from fulmen.modeling.gqa import attention as gqa_attention
from fulmen.modeling.gqa.cache import DsaCache
from fulmen.modeling.index_shape import default_dsa
from fulmen.modeling.mla import attention as mla_attention
from fulmen.modeling.mla.attention import fulmen_attention
from fulmen.modeling.mla.cache import MlaCache
from fulmen.ops.dispatch import pin_backend
from tests.modeling.gqa.tiny_gqa import make_dense, make_dsa, random_ids
from tests.modeling.mla.tiny_mla import make_mla, mla_ids

TOPK, SHORT, LONG = 8, 6, 20
BYTES = 4


def counted_flops(model, ids, **options):
    """Of one forward pass: every matrix product."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter, pin_backend("reference"):
        model(ids, **options)
    return counter.get_total_flops()


def flops_of_last(model, cache, ids):
    """Fill the cache with all tokens but the last, then count that one's FLOPs."""
    with torch.no_grad():
        model(ids[:, :-1], past_key_values=cache)
    return counted_flops(model, ids[:, -1:], past_key_values=cache)


@pytest.mark.parametrize("name", ["llama", "qwen3", "qwen2-mixed"])
def test_dense_prompt_of_grouped_heads(name):
    """Eager attention multiplies every pair of the square, so that each token sees them all."""
    model = make_dense(name)
    model.set_attn_implementation("eager")
    dsa = default_dsa(model.config)
    length = SHORT  # within the window, where there is one
    counted = counted_flops(model, random_ids(1, length), logits_to_keep=1)
    head = 2 * head_weights(model.config)
    assert counted == length * prefill_cost(model.config, dsa, length).dense_flops + head


def test_dense_prompt_of_mla():
    """Stock DeepSeek-V3 expands keys and values, as the formula for prompts does."""
    model = make_mla("v3", attn="eager", first_k_dense_replace=3)
    counted = counted_flops(model, mla_ids(1, LONG), logits_to_keep=1)
    cost = prefill_cost(model.config, default_dsa(model.config), LONG)
    assert counted == LONG * cost.dense_flops + 2 * head_weights(model.config)


@pytest.mark.parametrize("length", [SHORT, TOPK, TOPK + 1, LONG])
@pytest.mark.parametrize("name", ["llama", "qwen3", "qwen2-mixed"])
def test_decoding_with_grouped_heads(name, length):
    model = make_dsa(make_dense(name), topk=TOPK)
    counted = flops_of_last(model, DsaCache(model.config), random_ids(1, length))
    cost = decode_cost(model.config, dsa_of(model.config), length, BYTES)
    assert counted == cost.dsa_flops
    if length <= TOPK:
        assert cost.dsa_flops > cost.dense_flops


@pytest.mark.parametrize("length", [SHORT, LONG])
@pytest.mark.parametrize("kind", ["v32", "glm"])
def test_decoding_with_mla(kind, length):
    model = make_mla(kind, **_without_experts(kind))
    with fulmen_attention(model):
        counted = flops_of_last(model, MlaCache(model.config), mla_ids(1, length))
    dsa = dsa_of(model.config)
    # The model makes index queries even where nothing is scored, which no engine need do.
    needless = 3 * 2 * indexer_cost(model.config, dsa).query_weights if length <= TOPK else 0
    assert counted - needless == decode_cost(model.config, dsa, length, BYTES).dsa_flops


@pytest.mark.parametrize("length", [SHORT, LONG])
def test_bytes_read_with_grouped_heads(length, monkeypatch):
    model = make_dsa(make_dense("llama"), topk=TOPK)
    cache, read = DsaCache(model.config), []
    _note_reads(monkeypatch, gqa_attention, read)
    flops_of_last(model, cache, random_ids(1, length))
    cost = decode_cost(model.config, dsa_of(model.config), length, BYTES)
    _compare_bytes(cost, cache, read, length)


@pytest.mark.parametrize("length", [SHORT, LONG])
def test_bytes_read_with_mla(length, monkeypatch):
    model = make_mla("v32")
    cache, read = MlaCache(model.config), []
    _note_reads(monkeypatch, mla_attention, read)
    with fulmen_attention(model):
        flops_of_last(model, cache, mla_ids(1, length))
    cost = decode_cost(model.config, dsa_of(model.config), length, BYTES)
    _compare_bytes(cost, cache, read, length)


def _without_experts(kind):
    layers = {"first_k_dense_replace": 3} if kind == "v32" else {"mlp_layer_types": ["dense"] * 3}
    return {**layers, "index_topk": TOPK}


def _note_reads(monkeypatch, module, read):
    """Note the bytes that attention reads for a decoded token, of its distinct keys and values."""
    sparse, dense = module.sparse_attention, module.dense_attention

    def noted_bytes(k, v):
        # MLA's values are a part of its keys: the same memory.
        shared = v.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()
        return k.nbytes if shared else k.nbytes + v.nbytes

    def sparse_and_note(q, k, v, topk, *softmax):
        if q.shape[1] == 1:
            rows = topk[0, 0][topk[0, 0] >= 0].unique().long()
            read.append(noted_bytes(k, v) * len(rows) // k.shape[1])
        return sparse(q, k, v, topk, *softmax)

    def dense_and_note(q, k, v, start, stop, *softmax):
        if q.shape[1] == 1:
            read.append(noted_bytes(k, v) * int(stop - start) // k.shape[1])
        return dense(q, k, v, start, stop, *softmax)

    monkeypatch.setattr(module, "sparse_attention", sparse_and_note)
    monkeypatch.setattr(module, "dense_attention", dense_and_note)


def _compare_bytes(cost, cache, read, length):
    """Keys and values as the attention got them; index keys all, or the one that is stored up to k."""
    index = cache.nbytes.index_keys if length > TOPK else cache.nbytes.index_keys // length
    assert len(read) == len(cache.layers)
    assert cost.dsa_bytes == sum(read) + index
    assert cost.dense_bytes == cache.nbytes.kv
    assert (sum(read) < cache.nbytes.kv) == (length > TOPK)


QWEN3_8B = Qwen3Config(
    vocab_size=151_936,
    hidden_size=4096,
    intermediate_size=12_288,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=40_960,
)
LLAMA_70B = LlamaConfig(
    vocab_size=128_256,
    hidden_size=8192,
    intermediate_size=28_672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    max_position_embeddings=131_072,
)
V32, GLM_5 = DeepseekV32Config(), GlmMoeDsaConfig()


@pytest.mark.parametrize(
    ("config", "billions", "cache_bytes"),
    [
        # Published: 8.2 B parameters with embedding and head apart; 36 layers x 2 x 8 x 128 numbers.
        (QWEN3_8B, 7.6, 147_456),
        # 70.6 B with the embedding, which multiplies nothing.
        (LLAMA_70B, 69.5, 327_680),
        # "37B activated" and "40B active"; 576 numbers a layer.
        (V32, 37, 70_272),
        (GLM_5, 40, 89_856),
    ],
    ids=["qwen3-8b", "llama-70b", "v3.2", "glm-5"],
)
def test_published_shapes(config, billions, cache_bytes):
    dsa = dsa_of(config) if config in (V32, GLM_5) else default_dsa(config, index="one-level")
    assert token_bytes(config, dsa).kv == cache_bytes
    assert (layer_weights(config) + head_weights(config)) / 1e9 == pytest.approx(billions, rel=0.05)
    short, long = (decode_cost(config, dsa, position) for position in (dsa.topk, 131_072))
    assert short.dsa_bytes > short.dense_bytes
    assert long.dense_bytes == 131_072 * cache_bytes
    # Index keys bound what one level saves: a fifth of the cache at most, 22 % in V3.2 and GLM-5.
    assert 4 < long.dense_bytes / long.dsa_bytes < 5
    assert long.dsa_flops < long.dense_flops
