"""Converted models that read images: the dense model at k >= length, one result however a prompt is read."""

import pytest
import torch

from fulmen import set_topk
from fulmen.errors import CacheError
from fulmen.modeling.families import dsa_of, empty_cache
from fulmen.modeling.selectors import IndexerSelector, dsa_attentions, use_selector
from tests.modeling.whole.tiny_whole import WHOLE, convert_whole, make_whole, prompt


def real_logits(output, inputs) -> torch.Tensor:
    """Of all tokens but padding."""
    return output.logits[inputs["attention_mask"].bool()]


@pytest.mark.parametrize("name", WHOLE)
def test_it_is_the_dense_model_at_k_of_its_length(name):
    dense = make_whole(name)
    model, inputs = convert_whole(dense), prompt(name)
    with torch.no_grad():
        expected = real_logits(dense(**inputs), inputs)
        other = real_logits(dense(**{**inputs, "pixel_values": -inputs["pixel_values"]}), inputs)
        sparse = real_logits(model(**inputs), inputs)
        set_topk(model, 27)
        for use_cache in (True, False):
            found = real_logits(model(**inputs, use_cache=use_cache), inputs)
            torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    # Neither pixels nor the choice of keys are without effect.
    assert not torch.allclose(other, expected, atol=1e-2)
    assert not torch.allclose(sparse, expected, atol=1e-2)
    asked = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(**inputs, **asked), dense.generate(**inputs, **asked))


@pytest.mark.parametrize("name", ["idefics3", "qwen2_5_vl", "gemma3"])
def test_below_k_a_token_after_the_prompt_is_as_in_one_text(name):
    """With images and padding, from a cache or without one."""
    model, inputs = convert_whole(make_whole(name), topk=4), prompt(name)
    asked = {"max_new_tokens": 4, "do_sample": False}
    cached = model.generate(**inputs, **asked)
    assert torch.equal(model.generate(**inputs, **asked, use_cache=False), cached)
    assert cached.shape == (2, 25)


def test_what_is_asked_of_a_language_model_is_asked_of_the_whole_one():
    model = convert_whole(make_whole("idefics3"))
    set_topk(model, 5)
    assert dsa_of(model.config).topk == 5
    assert {attention.topk for attention in dsa_attentions(model)} == {5}
    assert len(empty_cache(model.config).layers) == 3
    with pytest.raises(CacheError, match="no room for index keys"):
        model.generate(**prompt("idefics3"), cache_implementation="static")


class Recorded(IndexerSelector):
    """Remembers what the indexer saw and chose."""

    def __init__(self):
        self.seen = []

    def select(self, inputs, topk):
        chosen_BTK = super().select(inputs, topk)
        self.seen.append((inputs.start_BT, inputs.stop_BT, chosen_BTK))
        return chosen_BTK


def test_a_token_of_an_image_chooses_among_its_own_image_too():
    """In Gemma 3; tokens of texts choose among the past."""
    model, inputs, recorded = convert_whole(make_whole("gemma3"), topk=4), prompt("gemma3"), Recorded()
    with use_selector(model, recorded), torch.no_grad():
        model(**inputs)
    is_image_BT, own_T = inputs["token_type_ids"].bool(), torch.arange(21)
    later = 0
    for start_BT, stop_BT, chosen_BTK in recorded.seen:
        is_chosen_BTK = chosen_BTK >= 0
        inside_BTK = (chosen_BTK >= start_BT[..., None]) & (chosen_BTK < stop_BT[..., None])
        assert torch.equal(is_chosen_BTK, inside_BTK)
        assert torch.equal(is_chosen_BTK.sum(-1), (stop_BT - start_BT).clamp(max=4))
        assert stop_BT[is_image_BT].tolist() == 2 * [*4 * [9], *4 * [17]]
        later += int((chosen_BTK > own_T[:, None]).sum())
    assert later > 0
