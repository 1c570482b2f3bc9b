"""Converted models that read images: the dense model at k >= length, one result however a prompt is read."""

import pytest
import torch

from fulmen import set_topk
from fulmen.errors import CacheError
from fulmen.modeling.families import dsa_of, empty_cache
from fulmen.modeling.selectors import dsa_attentions
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


@pytest.mark.parametrize("name", WHOLE)
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
