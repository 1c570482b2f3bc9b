"""A sample: a prompt of a given length, and the strings that a right answer has.

A task says what to ask (`PromptSpec`); `make_sample` lays that into text, to the token.
"""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fulmen.data import opening_ids, token_ids
from fulmen.errors import ConfigError
from fulmen.evaluation.needle_text import split_answer


@dataclass(frozen=True, eq=False)
class Sample:
    """One question.

    Attributes:
        task: name of its task.
        length: tokens of prompt and answer together, as RULER counts (arXiv 2404.06654, section 4).
        number: which sample of its task and length.
        prompt_ids: [length - answer_tokens] int64.
        expected: the strings that a right answer has.
        answer_ids: [A] int64, the tokens of the one right answer where it is short and fixed: then it is
            scored in one forward pass. None: it is generated, and must contain `expected` in any order.
        answer_tokens: tokens that an answer may have.
        stop: what ends an answer that is generated, after its first word.
    """

    task: str
    length: int
    number: int
    prompt_ids: Tensor
    expected: tuple[str, ...]
    answer_ids: Tensor | None
    answer_tokens: int
    stop: str = "\n"

    def share_found(self, answer: str) -> float:
        """Share of the expected strings in an answer: as whole words, whatever their case.

        A fixed answer must stand at the beginning.
        """
        if self.answer_ids is not None:
            return float(answer.strip().lower().startswith(self.expected[0].lower()))
        ended = answer.lstrip().partition(self.stop)[0]
        hits = (re.search(rf"\b{re.escape(text)}\b", ended, re.IGNORECASE) for text in self.expected)
        return sum(hit is not None for hit in hits) / len(self.expected)


class PromptSpec(NamedTuple):
    """What one sample asks, in words.

    inserts: pieces to hide in the haystack, in this order. question: the end of the prompt, with the answer's
    first words. expected: as in `Sample`. before: the beginning of the prompt. body: given the tokens there
    are, pieces that stand in place of the haystack.
    """

    inserts: Sequence[str]
    question: str
    expected: tuple[str, ...]
    before: str = ""
    body: Callable[[int], list[list[int]]] | None = None


class TaskContext(NamedTuple):
    """What a task works with. words: a vocabulary, the most frequent first. random: the sample's own."""

    tokenizer: Any
    words: Sequence[str]
    random: random.Random

    def ids(self, text: str) -> list[int]:
        """The tokens of a text alone."""
        return token_ids(self.tokenizer, text)


@dataclass(frozen=True)
class Task:
    """A kind of question.

    Attributes:
        name: as in `--tasks`.
        make_spec: says what one sample asks.
        answer_tokens: tokens that an answer may have.
        fixed: whether there is one short right answer, which follows the prompt immediately.
    """

    name: str
    make_spec: Callable[[TaskContext], PromptSpec]
    answer_tokens: int
    fixed: bool = False


def make_sample(
    task: Task,
    haystack_ids: Sequence[int],
    tokenizer: Any,
    length: int,
    *,
    number: int = 0,
    seed: int = 0,
    words: Sequence[str] = (),
) -> Sample:
    """One sample of a task; the same arguments give the same sample.

    Args:
        haystack_ids: at least `length` tokens of text without an opening token.
        words: for the tasks that are lists of words.

    Raises ConfigError if `length` has no room for the question.
    """
    context = TaskContext(tokenizer, words, random.Random(f"{seed}/{task.name}/{length}/{number}"))
    spec = task.make_spec(context)
    question, answer = context.ids(spec.question), None
    if task.fixed:
        question, answer = split_answer(tokenizer, spec.question, spec.expected[0])
        assert len(answer) <= task.answer_tokens, (task.name, spec.expected)
    available = length - task.answer_tokens - len(question)
    prompt = (
        _before_question(spec, context, available, haystack_ids, f"length={length} of {task.name}") + question
    )
    assert len(prompt) == length - task.answer_tokens, (task.name, len(prompt))
    return Sample(
        task=task.name,
        length=length,
        number=number,
        prompt_ids=torch.tensor(prompt, dtype=torch.int64),
        expected=spec.expected,
        answer_ids=None if answer is None else torch.tensor(answer, dtype=torch.int64),
        answer_tokens=task.answer_tokens,
    )


def _before_question(
    spec: PromptSpec, context: TaskContext, available: int, haystack: Sequence[int], what: str
) -> list[int]:
    """`available` tokens: what goes before, and the haystack with its inserts, or pieces in its place.

    Pieces rarely fill the room to the token; what is left is haystack, at the very beginning.
    """
    opening, before = opening_ids(context.tokenizer), context.ids(spec.before)
    available -= len(opening) + len(before)
    pieces = spec.body(available) if spec.body else [context.ids(text) for text in spec.inserts]
    rest = available - sum(map(len, pieces))
    if rest < 0:
        raise ConfigError(f"{what} has no room for what is asked; use {-rest} tokens more")
    assert len(haystack) >= rest, (len(haystack), rest)
    if spec.body:
        return [*opening, *haystack[:rest], *before, *chain.from_iterable(pieces)]
    cuts = sorted(context.random.randint(0, rest) for _ in pieces)
    text = [*opening, *before, *haystack[: cuts[0]]]
    for piece, (start, stop) in zip(pieces, pairwise([*cuts, rest]), strict=True):
        text += [*piece, *haystack[start:stop]]
    return text
