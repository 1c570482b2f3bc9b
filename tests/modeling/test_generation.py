"""`generate` of converted models: which cache it makes, in which pieces it reads the prompt."""

import pytest
import torch
from transformers import GenerationConfig

from fulmen import CacheError
from fulmen.modeling.gqa.cache import DsaCache
from fulmen.modeling.lengths import PREFILL_CHUNK
from tests.modeling.gqa.tiny_gqa import make_dense, make_dsa, pair, random_ids


@pytest.fixture(scope="module")
def model():
    return make_dsa(make_dense("llama"), topk=8)


@pytest.fixture
def forwards(model):
    """(tokens read, cache) of every forward pass of the model."""
    seen = []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((kwargs["input_ids"].shape[1], kwargs["past_key_values"])),
        with_kwargs=True,
    )
    yield seen
    hook.remove()


def room(cache):
    return cache.layers[0].keys.untyped_storage().nbytes() // cache.layers[0].keys[:, :, :1].numel() // 4


@pytest.mark.parametrize(
    ("settings", "planned"),
    [
        ({"max_new_tokens": 5}, 15),
        ({"max_length": 17}, 17),
        ({"max_new_tokens": 5, "max_length": 40}, 15),
        ({"generation_config": GenerationConfig(max_new_tokens=6)}, 16),
    ],
)
def test_cache_has_room_for_the_planned_length(model, forwards, settings, planned):
    model.generate(random_ids(2, 10), do_sample=False, pad_token_id=0, **settings)
    cache = forwards[-1][1]
    assert isinstance(cache, DsaCache)
    assert room(cache) == planned


def test_models_own_generation_config_counts(forwards, model):
    model.generation_config.max_new_tokens = 4
    try:
        model.generate(random_ids(1, 10))
    finally:
        model.generation_config.max_new_tokens = None
    assert room(forwards[-1][1]) == 14


@pytest.mark.parametrize("settings", [{}, {"generation_config": GenerationConfig(max_new_tokens=2)}])
def test_a_long_prompt_is_read_in_chunks(model, forwards, settings):
    settings = settings or {"max_new_tokens": 2}
    model.generate(random_ids(1, PREFILL_CHUNK + 10), **settings)
    assert [tokens for tokens, _ in forwards] == [PREFILL_CHUNK, 10, 1]


def test_a_given_chunk_size_is_kept_and_changes_nothing(model, forwards):
    ids = random_ids(1, 40)
    chunked = model.generate(ids, max_new_tokens=6, do_sample=False, prefill_chunk_size=16)
    assert [tokens for tokens, _ in forwards] == [16, 16, 8, 1, 1, 1, 1, 1]
    assert torch.equal(chunked, model.generate(ids, max_new_tokens=6, do_sample=False))


def test_chunked_prefill_of_a_left_padded_batch(model):
    ids = random_ids(2, 40)
    mask = torch.ones_like(ids)
    mask[1, :30] = 0
    inputs = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    batch = model.generate(ids, attention_mask=mask, prefill_chunk_size=16, **inputs)
    for row, pads in ((0, 0), (1, 30)):
        alone = model.generate(ids[row : row + 1, pads:], **inputs)
        assert torch.equal(batch[row, pads:], alone[0])


def test_without_cache_the_same_tokens(model):
    ids = random_ids(2, 20)
    inputs = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, use_cache=False, **inputs), model.generate(ids, **inputs))


def test_conversation_continues_in_its_cache(model):
    ids = random_ids(1, 20)
    cache = DsaCache(model.config)
    inputs = {"max_new_tokens": 5, "do_sample": False}
    first = model.generate(ids, past_key_values=cache, **inputs)
    longer = torch.cat((first, random_ids(1, 7, seed=3)), 1)
    assert torch.equal(
        model.generate(longer, past_key_values=cache, **inputs), model.generate(longer, **inputs)
    )


@pytest.mark.parametrize("name", ["static", "quantized", "offloaded"])
def test_other_caches_are_refused(model, name):
    with pytest.raises(CacheError, match=f"cache_implementation='{name}' has no room for index keys"):
        model.generate(random_ids(1, 4), max_new_tokens=2, cache_implementation=name)


def test_inputs_embeds_as_in_the_dense_model():
    dense, dsa = pair("llama", 64)
    embeds = dense.get_input_embeddings()(random_ids(1, 12)).detach()
    inputs = {"inputs_embeds": embeds, "max_new_tokens": 5, "do_sample": False}
    assert torch.equal(dsa.generate(**inputs), dense.generate(**inputs))


def test_assisted_decoding_crops_the_cache(model):
    ids = random_ids(1, 20)
    inputs = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(
        model.generate(ids, prompt_lookup_num_tokens=3, **inputs), model.generate(ids, **inputs)
    )
