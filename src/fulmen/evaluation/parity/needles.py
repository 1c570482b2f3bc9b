"""Needle tasks in one forward pass: a number hidden in a long text and asked for at its end.

For benchmarks that ask many; the report's own questions are answered by generation (`lookups.py`).

A fixed selection of keys loses look-up long before it loses likelihood, so loss alone does not judge it. With
several needles of the same form the asked one must be told from its like: that finds an indexer that points
to the right sort of line but not to the right line. The forms follow RULER (arXiv 2404.06654, section 3.1);
the words were chosen so that a dense model of 135 M parameters finds most of the numbers.

A text is the costly part, a question is short: every needle of a text is asked for, and `score_samples` reads
the text once.
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, cycle
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fulmen.config import require_positive_int
from fulmen.data import Document, draw_sequences, opening_ids, token_ids
from fulmen.data.lookup_words import NAMES
from fulmen.errors import ConfigError
from fulmen.evaluation.greedy import answer_by_forward
from fulmen.evaluation.needle_text import NEEDLE, QUESTION, split_answer
from fulmen.modeling.cache import forgotten_after
from fulmen.modeling.families import empty_cache
from fulmen.modeling.rope_tables import are_rotated_alike, restored_rope, rope_for_length

DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)


@dataclass(frozen=True, eq=False)
class NeedleSample:
    """A prompt and the number that it asks for.

    Attributes:
        prompt_ids: [length] int64; the text with its needles and the question.
        answer_ids: [A] int64; the tokens of the answer that follow.
        answer: the five digits.
        depth: where in the text the needle asked for lies: 0 is the beginning, 1 the end.
        length: tokens of the prompt.
        n_keys: needles of the same form in it.
        text: number of the text, which samples of the same length and `n_keys` may share; None: its own.
    """

    prompt_ids: Tensor
    answer_ids: Tensor
    answer: str
    depth: float
    length: int
    n_keys: int
    text: int | None = None


def needle_samples(
    documents: Iterable[Document],
    tokenizer: Any,
    length: int,
    count: int,
    *,
    n_keys: int = 1,
    seed: int = 0,
) -> list[NeedleSample]:
    """Hide `n_keys` needles in each of `count` texts, and ask for every one of them.

    That makes count * n_keys samples of exactly `length` prompt tokens, those of a text in a row. The needles
    lie evenly spread: one in each of `n_keys` equal stretches, at one of `DEPTHS` of it, which the texts take
    in turn. The same arguments give the same samples.

    Args:
        documents: the haystack, held-out text.

    Raises:
        ConfigError: a count that is not positive, more keys than names, or a length without room for them.
        CorpusError: the documents do not fill `count` sequences of `length` tokens.
    """
    if require_positive_int("n_keys", n_keys) > len(NAMES):
        raise ConfigError(f"n_keys={n_keys} is more than the {len(NAMES)} names there are; use fewer")
    haystacks = draw_sequences(documents, tokenizer, length, count, seed=seed)
    generator = random.Random(f"{seed}/{length}/{n_keys}")
    texts = [
        _samples_of_text(number, haystack.input_ids.tolist(), tokenizer, depth, n_keys, generator)
        for number, (haystack, depth) in enumerate(zip(haystacks, cycle(DEPTHS), strict=False))
    ]
    return list(chain.from_iterable(texts))


def sample_groups(samples: Sequence[NeedleSample]) -> list[list[NeedleSample]]:
    """Neighbours that ask about one text, together; a sample whose text is its own is alone."""
    groups: list[list[NeedleSample]] = []
    for sample in samples:
        if groups and sample.text is not None and _text_key(sample) == _text_key(groups[-1][0]):
            groups[-1].append(sample)
        else:
            groups.append([sample])
    return groups


def tokens_to_read(group: Sequence[NeedleSample]) -> int:
    """Prompt tokens that `score_samples` reads: the start that all prompts share once, the rest of each.

    (Where RoPE goes by the length it may have to read each prompt whole.)
    """
    shared = _shared_start(group)
    return shared + sum(len(sample.prompt_ids) - shared for sample in group)


@torch.no_grad()
def score_samples(model: PreTrainedModel, group: Sequence[NeedleSample]) -> list[bool]:
    """Whether a DSA model answers each sample of one text exactly, by greedy decoding.

    The start that the prompts share is read once into a cache; what follows runs on top of it and is cut off
    again. (Prompts that RoPE rotates by different tables, dynamic NTK or LongRoPE, share nothing.) The
    answers are those of `score_by_forward`. The model must be in eval mode; a stock MLA model, under
    `fulmen_attention`.
    """
    shared = _shared_start(group)
    shortest = min(len(sample.prompt_ids) for sample in group)
    longest = max(len(sample.prompt_ids) + len(sample.answer_ids) for sample in group)
    if len(group) == 1 or shared == 0 or not are_rotated_alike(model, shortest, longest):
        return [score_by_forward(model, sample) for sample in group]
    cache = empty_cache(model.config, longest)
    options = {"past_key_values": cache, "use_cache": True}
    with rope_for_length(model, shortest):
        model(group[0].prompt_ids[None, :shared].to(model.device), logits_to_keep=1, **options)
    answers = []
    for sample in group:
        rest_ids = torch.cat([sample.prompt_ids[shared:], sample.answer_ids])
        keep = len(sample.answer_ids) + 1
        with forgotten_after(cache):
            logits_BTV = model(rest_ids[None].to(model.device), logits_to_keep=keep, **options).logits
        answers.append(_is_greedy(logits_BTV[0], sample))
    return answers


def score_by_forward(model: PreTrainedModel, sample: NeedleSample) -> bool:
    """Whether the model answers a sample exactly, by greedy decoding, in one forward pass.

    Greedy decoding writes the answer if and only if each of its tokens is the most likely one after those
    before it, and these are then the answer's own: so all are given at once. The model must be in eval mode.
    """
    # No text that was read before may change how this one is rotated.
    with restored_rope(model):
        return answer_by_forward(model, sample.prompt_ids, sample.answer_ids) == sample.answer_ids.tolist()


def _is_greedy(logits_TV: Tensor, sample: NeedleSample) -> bool:
    """Whether the answer's tokens are the likeliest; the last row, behind the answer, does not count."""
    answer_length = len(sample.answer_ids)
    assert len(logits_TV) > answer_length
    return torch.equal(logits_TV[-answer_length - 1 : -1].argmax(-1).cpu(), sample.answer_ids)


def _text_key(sample: NeedleSample) -> tuple[int, int, int | None]:
    return sample.n_keys, sample.length, sample.text


def _shared_start(group: Sequence[NeedleSample]) -> int:
    """How many tokens all prompts begin with; every prompt has at least one more."""
    first_S = group[0].prompt_ids
    shared = min(len(sample.prompt_ids) for sample in group) - 1
    for sample in group[1:]:
        differs = (first_S[:shared] != sample.prompt_ids[:shared]).nonzero()
        shared = int(differs[0]) if len(differs) else shared
    return shared


def _samples_of_text(
    number: int, haystack: list[int], tokenizer: Any, offset: float, n_keys: int, generator: random.Random
) -> list[NeedleSample]:
    """Lay needles into a text, the stretch of it that leaves room for them and a question; ask for each."""
    names = generator.sample(NAMES, n_keys)
    numbers = [str(number) for number in generator.sample(range(10_000, 100_000), n_keys)]
    pairs = list(zip(names, numbers, strict=True))
    needles = [token_ids(tokenizer, NEEDLE.format(name=name, number=number)) for name, number in pairs]
    asked = [split_answer(tokenizer, QUESTION.format(name=name), number) for name, number in pairs]
    opening, length = opening_ids(tokenizer), len(haystack)
    available = length - len(opening) - max(len(question) for question, _ in asked) - sum(map(len, needles))
    if available < n_keys:
        need = length - available + n_keys
        raise ConfigError(f"length={length} cannot hold {n_keys} needles and a question; use {need} or more")
    text = haystack[len(opening) :]
    depths = [(key + offset) / n_keys for key in range(n_keys)]
    cuts = [int(available * depth) for depth in depths]
    start = opening + text[: cuts[0]]
    for needle, low, high in zip(needles, cuts, [*cuts[1:], available], strict=True):
        start += needle + text[low:high]
    samples = []
    for depth, (question, answer), digits in zip(depths, asked, numbers, strict=True):
        # A shorter question leaves room for some more of the text.
        more = text[available : available + length - len(start) - len(question)]
        prompt_ids, answer_ids = (
            torch.tensor(ids, dtype=torch.int64) for ids in (start + more + question, answer)
        )
        samples.append(NeedleSample(prompt_ids, answer_ids, digits, depth, length, n_keys, number))
    return samples
