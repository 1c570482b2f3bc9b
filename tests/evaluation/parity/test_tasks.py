"""Needle tasks: exact lengths, needles where they are said to be, and a score that is greedy decoding's."""

from dataclasses import replace
from pydoc_data.topics import topics

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fulmen.data import Document
from fulmen.errors import ConfigError, CorpusError
from fulmen.evaluation.parity.needles import (
    DEPTHS,
    NAMES,
    NeedleSample,
    needle_samples,
    sample_groups,
    score_by_forward,
    score_samples,
    tokens_to_read,
)
from fulmen.evaluation.variants import VARIANTS
from fulmen.modeling.families import accelerated
from fulmen.modeling.selectors import use_selector
from tests.evaluation.parity.tiny_parity import TOPK, random_ids, tiny_dense, tiny_dsa, tiny_v32

HAYSTACK = [Document(name, "prose", text) for name, text in topics.items() if len(text) > 12_000]


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    return smollm2


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=49152, initializer_range=0.5, **small)).eval()


@pytest.mark.parametrize("n_keys", [1, 4, 8])
@pytest.mark.parametrize("length", [512, 1024])
def test_prompts_are_exactly_as_long_and_end_in_the_question(tokenizer, length, n_keys):
    samples = needle_samples(HAYSTACK, tokenizer, length, 2, n_keys=n_keys)
    assert len(samples) == 2 * n_keys
    for sample in samples:
        assert sample.prompt_ids.shape == (length,)
        assert sample.prompt_ids.dtype == sample.answer_ids.dtype == torch.int64
        assert (sample.length, sample.n_keys) == (length, n_keys)
        prompt = tokenizer.decode(sample.prompt_ids)
        name = prompt.rpartition(" of ")[2].removesuffix(":")
        assert name in NAMES
        assert prompt.count(f"The secret number of {name}: {sample.answer}\n") == 1
        assert prompt.count("The secret number of ") == n_keys + 1
        assert tokenizer.decode(sample.answer_ids) == f" {sample.answer}"
        assert len(sample.answer) == 5


@pytest.mark.parametrize("n_keys", [1, 8, len(NAMES)])
def test_the_asked_needle_lies_at_its_depth_and_the_others_around_it(tokenizer, n_keys):
    length = 2048
    samples = needle_samples(HAYSTACK, tokenizer, length, 6, n_keys=n_keys)
    offsets = [*DEPTHS, DEPTHS[0]]
    assert [sample.depth for sample in samples] == [(k + o) / n_keys for o in offsets for k in range(n_keys)]
    for sample in samples:
        prompt = tokenizer.decode(sample.prompt_ids).rpartition("\n\nQuestion")[0]
        *needles, _ = prompt.split("The secret number of ")
        where = prompt.index(f": {sample.answer}\n") / len(prompt)
        assert where == pytest.approx(sample.depth, abs=0.12)
        assert max(map(len, needles[1:]), default=0) < 2.5 * len(prompt) / n_keys


def test_numbers_and_names_of_a_prompt_differ(tokenizer):
    sample, *_ = needle_samples(HAYSTACK, tokenizer, 1024, 1, n_keys=8)
    lines = [
        line
        for line in tokenizer.decode(sample.prompt_ids).split("\n")
        if line.startswith("The secret number of")
    ]
    names, numbers = zip(
        *(line.removeprefix("The secret number of ").split(": ") for line in lines), strict=True
    )
    assert len(set(names)) == len(set(numbers)) == 8


def test_every_needle_of_a_text_is_asked_for_and_the_text_is_shared(tokenizer):
    samples = needle_samples(HAYSTACK, tokenizer, 512, 3, n_keys=4)
    groups = sample_groups(samples)
    assert [len(group) for group in groups] == [4, 4, 4]
    for group in groups:
        assert len({sample.answer for sample in group}) == 4
        # A question takes fewer than 40 tokens; all before it is the same.
        assert tokens_to_read(group) < 512 + 3 * 40
        assert len({tuple(sample.prompt_ids[: 512 - 40].tolist()) for sample in group}) == 1
    single = needle_samples(HAYSTACK, tokenizer, 512, 3)
    assert [len(group) for group in sample_groups(single)] == [1, 1, 1]


def test_the_same_seed_gives_the_same_samples(tokenizer):
    one, again, other = (
        needle_samples(HAYSTACK, tokenizer, 512, 3, n_keys=2, seed=seed) for seed in (1, 1, 2)
    )
    assert all(torch.equal(a.prompt_ids, b.prompt_ids) for a, b in zip(one, again, strict=True))
    assert not any(torch.equal(a.prompt_ids, b.prompt_ids) for a, b in zip(one, other, strict=True))


def test_every_sample_has_a_text_of_its_own(tokenizer):
    samples = needle_samples(HAYSTACK, tokenizer, 512, 20)
    assert len({tuple(sample.prompt_ids[:20].tolist()) for sample in samples}) == 20


def test_what_cannot_be_is_said(tokenizer):
    with pytest.raises(ConfigError, match=f"n_keys=99 is more than the {len(NAMES)} names"):
        needle_samples(HAYSTACK, tokenizer, 512, 1, n_keys=99)
    with pytest.raises(ConfigError, match="n_keys=0 cannot be"):
        needle_samples(HAYSTACK, tokenizer, 512, 1, n_keys=0)
    with pytest.raises(ConfigError, match=r"length=64 cannot hold 4 needles and a question; use \d+ or more"):
        needle_samples(HAYSTACK, tokenizer, 64, 1, n_keys=4)
    with pytest.raises(CorpusError, match="add text"):
        needle_samples(HAYSTACK[:1], tokenizer, 8192, 50)


def test_score_is_that_of_greedy_decoding(tokenizer, model):
    for sample in needle_samples(HAYSTACK, tokenizer, 160, 4):
        count = len(sample.answer_ids)
        written = model.generate(
            sample.prompt_ids[None], max_new_tokens=count, do_sample=False, eos_token_id=-1
        )
        greedy = replace(sample, answer_ids=written[0, -count:])
        assert score_by_forward(model, greedy)
        for place in range(count):
            wrong = greedy.answer_ids.clone()
            wrong[place] = (wrong[place] + 1) % 49152
            assert not score_by_forward(model, replace(sample, answer_ids=wrong))


def greedy_ids(model, prompt_ids, count):
    """What a forward pass without a cache would write, token by token."""
    ids = prompt_ids
    for _ in range(count):
        with torch.no_grad():
            logits = model(ids[None], use_cache=False).logits
        ids = torch.cat([ids, logits[0, -1:].argmax(-1)])
    return ids[len(prompt_ids) :]


@pytest.mark.parametrize("variant", ["dense", "oracle", "dsa", "window", "random"])
@pytest.mark.parametrize("make", [lambda: tiny_dsa(tiny_dense()), tiny_v32], ids=["llama", "deepseek_v32"])
def test_questions_on_a_cached_text_have_the_answers_of_whole_forwards(make, variant):
    model, text_ids = make(), random_ids(5 * TOPK)
    with accelerated(model), use_selector(model, VARIANTS[variant]):
        group = []
        for number in range(8):
            prompt_ids = torch.cat([text_ids, random_ids(3 + number, 7 + number)])
            answer_ids = greedy_ids(model, prompt_ids, 2)
            answer_ids[1] = (answer_ids[1] + number % 2) % 97
            group.append(NeedleSample(prompt_ids, answer_ids, "", 0.5, 70, 8, text=3))
        assert score_samples(model, group) == [True, False] * 4
        assert [score_by_forward(model, sample) for sample in group] == [True, False] * 4
