"""What is read once gives the numbers that reading it in every row gives, and the same gradients."""

import pytest
import torch

from fulmen.modeling.families import accelerated, has_dsa
from fulmen.modeling.rollouts import Sampling
from fulmen.training import beginnings
from fulmen.training.beginnings import can_share, common_beginning, hidden_states
from fulmen.training.rl.generate_engine import GenerateRollouts
from fulmen.training.sparse.lora import add_lora
from tests.modeling.gqa.tiny_gqa import FAMILIES, make_dense, make_dsa, random_ids

SHARED, OWN = 21, 9
# They have experts or states, which go with whole sequences.
APART = {"granite-moe", "qwen3-next", "gpt-oss"}


def rows():
    """Three rows with one beginning, longer than k."""
    return torch.cat([random_ids(1, SHARED).expand(3, -1), random_ids(3, OWN, seed=1)], 1)


def model_of(name: str, kind: str):
    model = make_dense(name)
    model = make_dsa(model, topk=8) if kind == "dsa" else model
    model.requires_grad_(True)
    add_lora(model, 4, 0)
    with torch.no_grad():
        for parameter in (p for name, p in model.named_parameters() if "lora_B" in name):
            parameter.normal_(std=0.1)
    for parameter in (p for name, p in model.named_parameters() if ".indexer." in name):
        parameter.requires_grad_(False)
    return model


def groups():
    """Two rows behind one prompt, three behind another, one of another length; replies of several lengths."""
    prompts = [random_ids(1, length, seed=length)[0] for length in (SHARED, SHARED - 8)]
    replies = [random_ids(1, OWN - row, seed=50 + row)[0] for row in range(5)]
    texts = [torch.cat([prompts[row > 1], reply]) for row, reply in enumerate(replies)]
    wanted_B = torch.tensor([len(prompts[row > 1]) for row in range(5)])
    return torch.nn.utils.rnn.pad_sequence(texts, batch_first=True), wanted_B, [len(one) for one in replies]


def states_and_gradients(model, ids, wanted_B, lengths):
    """Hidden states of the rows' own tokens, and every gradient of a random sum of them."""
    model.zero_grad()
    with accelerated(model):
        hidden, begins_B = hidden_states(model, ids, wanted_B, max(lengths))
        spans = zip(hidden, (wanted_B - begins_B).tolist(), lengths, strict=True)
        own = torch.cat([row[begin : begin + length] for row, begin, length in spans])
        (own * torch.randn(own.shape, generator=torch.Generator().manual_seed(0))).sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return begins_B.tolist(), own.detach(), gradients


@pytest.mark.parametrize("several", [False, True], ids=["one-prompt", "prompts"])
@pytest.mark.parametrize("kind", ["dsa", "dense"])
@pytest.mark.parametrize("name", FAMILIES)
def test_numbers_and_gradients_are_those_of_rows_read_by_themselves(name, kind, several, monkeypatch):
    model = model_of(name, kind)
    ids, wanted_B, lengths = groups() if several else (rows(), torch.full((3,), SHARED), [OWN] * 3)
    begins, shared, gradients = states_and_gradients(model, ids, wanted_B, lengths)
    assert begins == (wanted_B * (name not in APART)).tolist()
    monkeypatch.setattr(beginnings, "can_share", lambda _: False)
    none, whole, expected = states_and_gradients(model, ids, wanted_B, lengths)
    assert not any(none)
    assert torch.allclose(shared, whole, atol=1e-4)
    assert gradients.keys() == expected.keys()
    for place, gradient in gradients.items():
        scale = expected[place].abs().max()
        assert torch.allclose(gradient, expected[place], atol=1e-4 * float(scale) + 1e-5), place


def test_behind_prompts_of_unlike_lengths_only_replies_are_read():
    model, read = model_of("llama", "dsa"), []
    prompts = [random_ids(1, length, seed=length)[0] for length in (90, 30)]
    texts = [torch.cat([prompts[row // 2], random_ids(1, 3, seed=50 + row)[0]]) for row in range(4)]
    ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    embedding = model.get_input_embeddings()
    embedding.register_forward_hook(lambda _, given, __: read.append(tuple(given[0].shape)))
    hidden, begins_B = hidden_states(model, ids, torch.tensor([89, 89, 29, 29]), 4)
    assert read == [(2, 89), (4, 4)]
    assert hidden.shape[1] == 4
    assert begins_B.tolist() == [89, 89, 29, 29]


def test_no_more_is_shared_than_is_left_over_for_the_first_wanted_token():
    ids = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 3, 4]])
    assert [common_beginning(ids, most) for most in (4, 3, 2, 0)] == [3, 3, 2, 0]
    assert common_beginning(ids[:1], 4) == 4


def test_what_a_cache_does_not_carry_is_not_shared():
    model = model_of("llama", "dsa")
    assert can_share(model)
    next(p for name, p in model.named_parameters() if ".indexer." in name).requires_grad_(True)
    assert not can_share(model)
    dense = make_dense("llama")
    assert can_share(dense)
    assert not has_dsa(dense.config)
    dense.gradient_checkpointing_enable()
    assert not can_share(dense)


@pytest.mark.parametrize("kind", ["dsa", "dense"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "smollm3"])
def test_a_prompt_that_is_read_once_has_the_same_replies(name, kind, monkeypatch):
    model = make_dense(name)
    model = make_dsa(model, topk=8) if kind == "dsa" else model
    prompts = [random_ids(1, length, seed=length)[0].tolist() for length in (12, 5, 17)]
    # Chunks of seven end within a group.
    engine = GenerateRollouts(model, list(range(2, 8)), 0, at_once=7)
    sampling = Sampling(4, 8, 0.9, 0.95, 32, seed=3)
    found = engine.generate(prompts, sampling)
    monkeypatch.setattr("fulmen.training.rl.generate_engine.prompts_cache", lambda *_: None)
    expected = engine.generate(prompts, sampling)
    assert [one.tokens for one in found] == [one.tokens for one in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.kept == other.kept
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
