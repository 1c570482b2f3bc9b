"""Needle tasks: a number hidden in a long text and asked for at its end.

A fixed selection of keys loses look-up long before it loses likelihood, so loss alone does not judge it. With
several needles of the same form the asked one must be told from its like: that finds an indexer that points
to the right sort of line but not to the right line. The forms follow RULER (arXiv 2404.06654, section 3.1);
the words were chosen so that a dense model of 135 M parameters finds most of the numbers.
"""

import random
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn

from fulmen.config import require_positive_int
from fulmen.corpus import Document, opening_ids, token_ids, windows
from fulmen.errors import ConfigError

NEEDLE = "\n\nThe secret number of {name}: {number}\n\n"
QUESTION = (
    "\n\nQuestion: which number is next to {name} in the text above?\nAnswer: The secret number of {name}:"
)
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
NAMES = (
    *("Alder", "Bramble", "Corin", "Dorset", "Elwood", "Fennick", "Garrow", "Hollis", "Iverna", "Jessop"),
    *("Kestrel", "Lorimer", "Marlow", "Nettle", "Orwen", "Petra", "Quill", "Ravenna", "Sorrel", "Tindall"),
    *("Umber", "Velda", "Wexford", "Yarrow", "Zephyr", "Ashdown", "Birkett", "Calder", "Dunmore", "Ennis"),
    *("Farrow", "Goswin", "Harker", "Ingram", "Jarrow", "Kelso", "Lydgate", "Merrin", "Norwood", "Osric"),
)


@dataclass(frozen=True, eq=False)
class NeedleSample:
    """A prompt and the number that it asks for.

    Attributes:
        prompt_ids: [length] int64; the text with its needles and the question.
        answer_ids: [A] int64; the tokens of the answer that follow.
        answer: the five digits.
        depth: where in the text the needle asked for lies, one of `DEPTHS`: 0 is the beginning, 1 the end.
        length: tokens of the prompt.
        n_keys: needles of the same form in it.
    """

    prompt_ids: Tensor
    answer_ids: Tensor
    answer: str
    depth: float
    length: int
    n_keys: int


def needle_samples(
    documents: Iterable[Document],
    tokenizer: Any,
    length: int,
    count: int,
    *,
    n_keys: int = 1,
    seed: int = 0,
) -> list[NeedleSample]:
    """Build `count` samples of exactly `length` prompt tokens, each in a text of its own.

    The needles of a prompt lie evenly spread; the samples ask for the depths in turn. The same arguments give
    the same samples.

    Args:
        documents: the haystack, held-out text.

    Raises:
        ConfigError: a count that is not positive, more keys than names, or a length without room for them.
        CorpusError: the documents do not fill `count` windows of `length` tokens.
    """
    if require_positive_int("n_keys", n_keys) > len(NAMES):
        raise ConfigError(f"n_keys={n_keys} is more than the {len(NAMES)} names there are; use fewer")
    haystacks = windows(documents, tokenizer, length, count, seed=seed)
    generator = random.Random(f"{seed}/{length}/{n_keys}")
    return [
        _needle_sample(haystack.input_ids.tolist(), tokenizer, depth, n_keys, generator)
        for haystack, depth in zip(haystacks, cycle(DEPTHS), strict=False)
    ]


@torch.no_grad()
def score_by_forward(model: nn.Module, sample: NeedleSample) -> bool:
    """Whether the model answers a sample exactly, by greedy decoding, in one forward pass.

    Greedy decoding writes the answer if and only if each of its tokens is the most likely one after those
    before it, and these are then the answer's own: so all are given at once. The model must be in eval mode.
    """
    length, answer_length = len(sample.prompt_ids), len(sample.answer_ids)
    input_ids = torch.cat([sample.prompt_ids, sample.answer_ids])[None]
    device = next(model.parameters()).device
    logits = model(input_ids.to(device), use_cache=False, logits_to_keep=answer_length + 1).logits[0]
    assert len(logits) in (answer_length + 1, length + answer_length)
    return torch.equal(logits[-answer_length - 1 : -1].argmax(-1).cpu(), sample.answer_ids)


def _needle_sample(
    haystack: list[int], tokenizer: Any, depth: float, n_keys: int, generator: random.Random
) -> NeedleSample:
    """Lay needles into a text: the stretch of it that leaves room for them and the question."""
    names = generator.sample(NAMES, n_keys)
    numbers = [str(number) for number in generator.sample(range(10_000, 100_000), n_keys)]
    needles = [
        token_ids(tokenizer, NEEDLE.format(name=name, number=number))
        for name, number in zip(names, numbers, strict=True)
    ]
    asked = int(depth * n_keys)
    question, answer = _question_and_answer(tokenizer, names[asked], numbers[asked])
    opening, length = opening_ids(tokenizer), len(haystack)
    room = length - len(opening) - len(question) - sum(map(len, needles))
    if room < n_keys:
        need = length - room + n_keys
        raise ConfigError(f"length={length} cannot hold {n_keys} needles and a question; use {need} or more")
    text = haystack[len(opening) : len(opening) + room]
    # One needle in each of n_keys equal stretches, at the same place in all of them.
    cuts = [int(room * (depth + (key - asked) / n_keys)) for key in range(n_keys)]
    prompt = opening + text[: cuts[0]]
    for needle, start, stop in zip(needles, cuts, [*cuts[1:], room], strict=True):
        prompt += needle + text[start:stop]
    return NeedleSample(
        prompt_ids=torch.tensor(prompt + question, dtype=torch.int64),
        answer_ids=torch.tensor(answer, dtype=torch.int64),
        answer=numbers[asked],
        depth=depth,
        length=length,
        n_keys=n_keys,
    )


def _question_and_answer(tokenizer: Any, name: str, number: str) -> tuple[list[int], list[int]]:
    """The tokens of both. A token across their border, which some tokenizers make, belongs to the answer."""
    question = token_ids(tokenizer, QUESTION.format(name=name))
    whole = token_ids(tokenizer, f"{QUESTION.format(name=name)} {number}")
    border = len(question)
    while question[:border] != whole[:border]:
        border -= 1
    return whole[:border], whole[border:]
