"""Converted models: the dense model while top-k covers the text; beyond, the same however they are fed."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from fulmen import set_topk
from fulmen.errors import ConfigError
from fulmen.modeling.families import has_dsa
from fulmen.modeling.gqa.cache import DsaCache
from fulmen.modeling.selectors import DenseSelector, Selector, use_selector
from fulmen.ops.dispatch import pin_backend
from tests.modeling.gqa.tiny_gqa import FAMILIES, VOCAB, make_dense, make_dsa, pair, random_ids

LENGTH, ROOMY, TIGHT = 24, 64, 6
CLOSE = {"rtol": 1e-4, "atol": 2e-5}
BF16_CLOSE = {"rtol": 3e-2, "atol": 8e-2}


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def in_chunks(model, ids, sizes, **kwargs):
    """Logits of a prompt read in pieces, with one cache."""
    cache = DsaCache(model.config) if has_dsa(model.config) else DynamicCache(config=model.config)
    parts, start = [], 0
    for size in sizes:
        if "attention_mask" in kwargs:
            chunk = {"attention_mask": kwargs["attention_mask"][:, : start + size]}
            chunk["position_ids"] = kwargs["position_ids"][:, start : start + size]
        else:
            chunk = {}
        parts.append(model(ids[:, start : start + size], past_key_values=cache, **chunk).logits)
        start += size
    return torch.cat(parts, 1)


def left_padded(ids, pads):
    """`ids` with the first `pads[row]` tokens of a row turned into padding: (ids, mask, position_ids)."""
    mask = torch.ones_like(ids)
    for row, count in enumerate(pads):
        mask[row, :count] = 0
    return ids.masked_fill(mask == 0, 0), mask, (mask.cumsum(-1) - 1).clamp(min=0)


@pytest.mark.parametrize("name", FAMILIES)
class TestBelowTopk:
    """K >= S: the dense model."""

    def test_prefill_logits(self, name):
        dense, dsa = pair(name, ROOMY)
        ids = random_ids(2, LENGTH)
        torch.testing.assert_close(dsa(ids).logits, dense(ids).logits, **CLOSE)

    def test_topk_equal_to_the_length_logits(self, name):
        dense, _ = pair(name, ROOMY)
        dsa = make_dsa(dense, LENGTH)
        ids = random_ids(2, LENGTH)
        torch.testing.assert_close(dsa(ids).logits, dense(ids).logits, **CLOSE)

    def test_decode_and_chunks(self, name):
        dense, dsa = pair(name, ROOMY)
        ids = random_ids(2, LENGTH)
        expected = dense(ids).logits
        torch.testing.assert_close(in_chunks(dsa, ids, [16] + [1] * 8), expected, **CLOSE)
        torch.testing.assert_close(in_chunks(dsa, ids, [10, 10, 4]), expected, **CLOSE)

    def test_left_padded_batch(self, name):
        dense, dsa = pair(name, ROOMY)
        ids, mask, position_ids = left_padded(random_ids(3, LENGTH), [0, 5, 17])
        inputs = {"attention_mask": mask, "position_ids": position_ids}
        real = mask.bool()
        expected = dense(ids, **inputs).logits[real]
        torch.testing.assert_close(dsa(ids, **inputs).logits[real], expected, **CLOSE)
        torch.testing.assert_close(in_chunks(dsa, ids, [9, 9, 1, 5], **inputs)[real], expected, **CLOSE)

    def test_right_padded_batch(self, name):
        dense, dsa = pair(name, ROOMY)
        ids, mask = random_ids(2, LENGTH), torch.ones(2, LENGTH, dtype=torch.long)
        mask[1, 15:] = 0
        real = mask.bool()
        expected = dense(ids, attention_mask=mask).logits[real]
        torch.testing.assert_close(dsa(ids, attention_mask=mask).logits[real], expected, **CLOSE)

    def test_packed_documents(self, name):
        dense, dsa = pair(name, ROOMY)
        ids = random_ids(1, LENGTH)
        position_ids = torch.cat((torch.arange(9), torch.arange(11), torch.arange(4)))[None]
        inputs = {"position_ids": position_ids, "use_cache": False}
        found = dsa(ids, **inputs).logits
        alone = [dense(part_ids, use_cache=False).logits for part_ids in ids.split([9, 11, 4], 1)]
        torch.testing.assert_close(found, torch.cat(alone, 1), **CLOSE)
        if name not in ("gpt-oss", "qwen3-next"):  # where Transformers does not look for documents
            torch.testing.assert_close(found, dense(ids, **inputs).logits, **CLOSE)

    def test_greedy_tokens(self, name):
        dense, dsa = pair(name, ROOMY)
        ids, mask, _ = left_padded(random_ids(2, 12), [0, 5])
        inputs = {"attention_mask": mask, "max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(dsa.generate(ids, **inputs), dense.generate(ids, **inputs))

    def test_bfloat16(self, name):
        dense = make_dense(name, torch.bfloat16)
        dsa = make_dsa(dense, ROOMY)
        ids = random_ids(2, LENGTH)
        torch.testing.assert_close(dsa(ids).logits.float(), dense(ids).logits.float(), **BF16_CLOSE)
        # In the same chunks: a product's rounding goes with its shape, and may decide between two experts.
        found, expected = (in_chunks(model, ids, [20, 1, 1, 2]).float() for model in (dsa, dense))
        torch.testing.assert_close(found, expected, **BF16_CLOSE)


@pytest.mark.parametrize("name", FAMILIES)
class TestAboveTopk:
    """K < S: sparse, and the same function of the text however it is fed."""

    def test_it_is_sparse(self, name):
        dense, dsa = pair(name, TIGHT)
        ids = random_ids(1, LENGTH)
        sparse, full = dsa(ids).logits, dense(ids).logits
        torch.testing.assert_close(sparse[:, :TIGHT], full[:, :TIGHT], **CLOSE)
        assert (sparse[:, -1] - full[:, -1]).abs().max() > 1e-2

    def test_prefill_decode_and_chunks_agree(self, name):
        _, dsa = pair(name, TIGHT)
        ids = random_ids(2, LENGTH)
        expected = dsa(ids).logits
        torch.testing.assert_close(in_chunks(dsa, ids, [1] * LENGTH), expected, **CLOSE)
        torch.testing.assert_close(in_chunks(dsa, ids, [5, 13, 6]), expected, **CLOSE)

    def test_a_row_alone_is_the_row_in_a_padded_batch(self, name):
        _, dsa = pair(name, TIGHT)
        pads = [0, 5, 15]
        ids, mask, position_ids = left_padded(random_ids(3, LENGTH), pads)
        inputs = {"attention_mask": mask, "position_ids": position_ids}
        together = dsa(ids, **inputs).logits
        chunked = in_chunks(dsa, ids, [7, 8, 1, 8], **inputs)
        for row, count in enumerate(pads):
            alone = dsa(ids[row : row + 1, count:]).logits[0]
            torch.testing.assert_close(together[row, count:], alone, **CLOSE)
            torch.testing.assert_close(chunked[row, count:], alone, **CLOSE)

    def test_a_packed_document_is_the_document_alone(self, name):
        _, dsa = pair(name, TIGHT)
        documents = [random_ids(1, length, seed=length) for length in (9, 14, 3)]
        position_ids = torch.cat([torch.arange(ids.shape[1]) for ids in documents])[None]
        packed = dsa(torch.cat(documents, 1), position_ids=position_ids, use_cache=False).logits
        alone = torch.cat([dsa(ids, use_cache=False).logits for ids in documents], 1)
        torch.testing.assert_close(packed, alone, **CLOSE)

    def test_backends_agree(self, name):
        _, dsa = pair(name, TIGHT)
        ids = random_ids(1, LENGTH)
        with pin_backend("reference"):
            expected = dsa(ids).logits
        torch.testing.assert_close(dsa(ids).logits, expected, **CLOSE)


class SinksAndWindow(Selector):
    """The first key and the last TIGHT - 1."""

    def select(self, inputs, topk):
        own = inputs.stop_BT - 1
        recent = own[..., None] - torch.arange(topk - 1)
        sink = torch.where(own[..., None] >= topk - 1, 0, -1)
        return torch.cat((sink, recent.clamp(min=-1)), -1).int()


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma3"])
def test_attention_over_a_known_selection_is_stock_attention_under_that_mask(name):
    dense, dsa = pair(name, TIGHT)
    ids = random_ids(2, LENGTH)
    t, s = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)
    seen = (s <= t) & ((s > t - (TIGHT - 1)) | (s == 0))

    def mask_of(seen):
        return torch.zeros(2, 1, LENGTH, LENGTH).masked_fill(~seen, torch.finfo(torch.float32).min)

    mask = mask_of(seen)
    if name == "gemma3":
        slides = (s <= t) & (s > t - dense.config.sliding_window)
        mask = {"full_attention": mask, "sliding_attention": mask_of(slides)}
    expected = dense(ids, attention_mask=mask).logits
    with use_selector(dsa, SinksAndWindow()):
        torch.testing.assert_close(dsa(ids).logits, expected, **CLOSE)
        torch.testing.assert_close(in_chunks(dsa, ids, [10, 1, 13]), expected, **CLOSE)


def test_dense_selector_is_the_dense_model_above_topk():
    dense, dsa = pair("llama", TIGHT)
    ids = random_ids(2, LENGTH)
    sparse = dsa(ids).logits
    with use_selector(dsa, DenseSelector()):
        torch.testing.assert_close(dsa(ids).logits, dense(ids).logits, **CLOSE)
    assert torch.equal(dsa(ids).logits, sparse)


def test_only_the_listed_layers_are_converted():
    dense = make_dense("llama")
    dsa = make_dsa(dense, TIGHT, layers=[1])
    kept = [name for name in dsa.state_dict() if "indexer" in name]
    assert {name.split(".")[2] for name in kept} == {"1"}
    ids = random_ids(1, LENGTH)
    torch.testing.assert_close(in_chunks(dsa, ids, [11, 1, 12]), dsa(ids).logits, **CLOSE)
    with use_selector(dsa, DenseSelector()):
        torch.testing.assert_close(dsa(ids).logits, dense(ids).logits, **CLOSE)


def test_topk_takes_effect_at_the_next_forward():
    dense = make_dense("qwen3")
    dsa = make_dsa(dense, TIGHT)
    ids = random_ids(1, LENGTH)
    sparse, full = dsa(ids).logits, dense(ids).logits
    set_topk(dsa, LENGTH)
    torch.testing.assert_close(dsa(ids).logits, full, **CLOSE)
    set_topk(dsa, TIGHT)
    assert torch.equal(dsa(ids).logits, sparse)
    assert dsa.config.dsa["topk"] == TIGHT


class LargestTensor(TorchDispatchMode):
    """Remembers the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.mark.parametrize("topk", [32, 4096])
@pytest.mark.parametrize("padded", [False, True])
def test_nothing_as_large_as_queries_times_keys_is_made(topk, padded):
    length = 1024
    dsa = make_dsa(make_dense("llama"), topk)
    ids, mask, position_ids = left_padded(random_ids(1, length), [100 if padded else 0])
    inputs = {"attention_mask": mask, "position_ids": position_ids} if padded else {}
    with LargestTensor() as largest:
        dsa(ids, logits_to_keep=1, **inputs)
    assert largest.elements < length * length // 2


@pytest.mark.parametrize("name", ["eager", "sdpa", "flash_attention_2"])
def test_another_attention_cannot_be_set(name):
    _, dsa = pair("llama", ROOMY)
    with pytest.raises(ConfigError, match=f"attn_implementation='{name}' cannot be set"):
        dsa.set_attn_implementation(name)
    dsa.set_attn_implementation("fulmen")


def test_hidden_states_and_inputs_embeds_as_in_the_stock_model():
    dense, dsa = pair("llama", ROOMY)
    ids = random_ids(1, LENGTH)
    theirs, ours = (model(ids, output_hidden_states=True).hidden_states for model in (dense, dsa))
    assert len(ours) == len(theirs)
    torch.testing.assert_close(ours[-1], theirs[-1], **CLOSE)
    embeds = dsa.get_input_embeddings()(ids)
    torch.testing.assert_close(dsa(inputs_embeds=embeds).logits, dsa(ids).logits, **CLOSE)


@pytest.mark.parametrize("kwargs", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3}])
def test_beams_and_samples_are_the_dense_models(kwargs):
    dense, dsa = pair("llama", ROOMY)
    ids, mask, _ = left_padded(random_ids(2, 12), [0, 4])
    results = []
    for model in (dense, dsa):
        torch.manual_seed(0)
        results.append(model.generate(ids, attention_mask=mask, max_new_tokens=8, pad_token_id=0, **kwargs))
    assert torch.equal(*results)


def test_vocabulary_is_untouched():
    _, dsa = pair("llama3-rope", ROOMY)
    assert dsa(random_ids(1, 4)).logits.shape == (1, 4, VOCAB)
    assert dsa.lm_head.weight is dsa.get_input_embeddings().weight
