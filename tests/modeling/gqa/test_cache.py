"""The in-place cache against concatenation."""

import pytest
import torch
from transformers.cache_utils import DynamicCache

from fulmen.errors import CacheError
from fulmen.modeling.cache import TokenBuffer, forgotten_after, has_states
from fulmen.modeling.gqa.cache import DsaCache, require_index_key_layers
from tests.modeling.gqa.tiny_gqa import make_dense, make_dsa, random_ids


@pytest.fixture(scope="module")
def model():
    return make_dsa(make_dense("llama"), topk=4, layers=[0, 2])


def step(batch=2, tokens=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, batch, 2, tokens, 16, generator=generator)
    return k, v, torch.randn(batch, tokens, 16, generator=generator)


def fill(cache, layer=0, sizes=(3, 1, 5, 1)):
    steps = [step(tokens=tokens, seed=seed) for seed, tokens in enumerate(sizes)]
    results = []
    for k, v, index_k in steps:
        results.append((*cache.update(k, v, layer), cache.update_indexer(index_k, layer)))
    whole = [torch.cat(parts, axis) for parts, axis in zip(zip(*steps, strict=True), (2, 2, 1), strict=True)]
    return results, whole


@pytest.mark.parametrize("planned", [None, 4, 10, 64])
def test_every_update_returns_all_tokens_so_far(model, planned):
    cache = DsaCache(model.config, planned)
    results, whole = fill(cache)
    for (k, v, index_k), length in zip(results, (3, 4, 9, 10), strict=True):
        assert torch.equal(k, whole[0][:, :, :length])
        assert torch.equal(v, whole[1][:, :, :length])
        assert torch.equal(index_k, whole[2][:, :length])
    assert cache.get_seq_length(0) == 10
    assert cache.get_mask_sizes(2, 0) == (12, 0)


def test_planned_room_is_never_reallocated_and_unplanned_room_doubles():
    planned, unplanned = TokenBuffer(40), TokenBuffer(None)
    rooms = {"planned": set(), "unplanned": set()}
    for _ in range(40):
        rooms["planned"].add(planned.append(torch.zeros(1, 1, 2)).data_ptr())
        rooms["unplanned"].add(unplanned.append(torch.zeros(1, 1, 2)).untyped_storage().nbytes())
    assert len(rooms["planned"]) == 1
    assert len(rooms["unplanned"]) == 7  # 1, 2, 4, ... 64 rows


def test_tokens_lie_one_after_the_other(model):
    cache = DsaCache(model.config, 10)
    k, *_ = fill(cache)[0][-1]
    assert k.transpose(1, 2).is_contiguous()


def test_crop_then_refill(model):
    cache = DsaCache(model.config)
    _, whole = fill(cache)
    cache.crop(-4)
    assert cache.get_seq_length() == 6
    assert torch.equal(cache.layers[0].keys, whole[0][:, :, :6])
    cache.crop(5)  # older convention: the length to keep
    k, v, index_k = step(tokens=2, seed=9)
    new_k, _ = cache.update(k, v, 0)
    assert torch.equal(new_k, torch.cat((whole[0][:, :, :5], k), 2))
    assert torch.equal(cache.update_indexer(index_k, 0), torch.cat((whole[2][:, :5], index_k), 1))


def test_reset_keeps_nothing(model):
    cache = DsaCache(model.config)
    fill(cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.nbytes == (0, 0)
    results, whole = fill(cache)
    assert torch.equal(results[-1][0], whole[0])


@pytest.mark.parametrize(
    ("change", "rows"),
    [
        (lambda cache: cache.reorder_cache(torch.tensor([1, 1])), [1, 1]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
    ],
)
def test_batch_changes_move_index_keys_too(model, change, rows):
    cache = DsaCache(model.config, 16)
    _, whole = fill(cache)
    change(cache)
    k, v, index_k = step(batch=len(rows), tokens=1, seed=9)
    new_k, new_v = cache.update(k, v, 0)
    assert torch.equal(new_k, torch.cat((whole[0][rows], k), 2))
    assert torch.equal(new_v, torch.cat((whole[1][rows], v), 2))
    assert torch.equal(cache.update_indexer(index_k, 0), torch.cat((whole[2][rows], index_k), 1))


def test_nbytes_counts_stored_tokens_of_both_kinds(model):
    cache = DsaCache(model.config, 64)
    with torch.no_grad():
        model(random_ids(2, 10), past_key_values=cache)
    kv = 2 * 3 * 2 * 10 * 2 * 16 * 4  # K and V, layers, batch, tokens, heads, dims, bytes
    index_keys = 2 * 2 * 10 * 2 * (8 + 2)  # converted layers, batch, tokens, index key heads, bytes and scale
    assert cache.nbytes == (kv, index_keys)
    assert cache.nbytes.index_keys == index_keys


@pytest.mark.parametrize("name", ["llama", "qwen3-5"])
def test_what_is_read_can_be_forgotten_states_included(name):
    model, ids = make_dsa(make_dense(name)), random_ids(2, 20)
    cache = DsaCache(model.config)
    with torch.no_grad():
        model(ids[:, :9], past_key_values=cache)
        with forgotten_after(cache):
            expected = model(ids[:, 9:], past_key_values=cache).logits
        assert cache.get_seq_length() == 9
        assert torch.equal(model(ids[:, 9:], past_key_values=cache).logits, expected)
    assert has_states(cache) == (name == "qwen3-5")


def test_only_converted_layers_have_room_for_index_keys(model):
    require_index_key_layers(DsaCache(model.config), model.config)
    with pytest.raises(ValueError, match="update_indexer"):
        DsaCache(model.config).update_indexer(torch.zeros(1, 1, 4), 1)


@pytest.mark.parametrize("call", ["forward", "generate"])
def test_a_cache_without_index_keys_is_refused(model, call):
    cache = DynamicCache(config=model.config)
    with pytest.raises(CacheError, match="DynamicCache has no room for the index keys of layer 0"):
        model(random_ids(1, 4), past_key_values=cache) if call == "forward" else model.generate(
            random_ids(1, 4), past_key_values=cache, max_new_tokens=2
        )


def test_gradients_flow_through_a_cache():
    model = make_dsa(make_dense("llama"), topk=4).train()
    ids = random_ids(1, 12)
    cache = DsaCache(model.config)
    first = model(ids[:, :7], past_key_values=cache).logits
    second = model(ids[:, 7:], past_key_values=cache).logits
    (first.sum() + second.sum()).backward()
    cached = model.model.layers[0].self_attn.k_proj.weight.grad.clone()
    model.zero_grad()
    model(ids).logits.sum().backward()
    torch.testing.assert_close(
        model.model.layers[0].self_attn.k_proj.weight.grad, cached, rtol=1e-4, atol=1e-4
    )
