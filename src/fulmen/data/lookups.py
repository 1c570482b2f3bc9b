"""Texts that ask and look up, made from any documents, to judge with.

Sentences of one form, each with a key and a value, lie at spread places of a text, and a question behind it
must tell its key from its like (RULER, arXiv 2404.06654, section 3.1). Loss on ordinary text hardly moves
while this breaks. Everything is written as the model expects it: in its chat template, or as plain text with
worked examples (`conversations.py`). Those to train with are in `lookup_training.py`.
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fulmen.config import require_positive_int
from fulmen.data.conversations import (
    FRAME,
    ConversationFormat,
    Example,
    Frame,
    Turn,
    conversation_format,
)
from fulmen.data.documents import Document
from fulmen.data.haystacks import Haystack, fit_tokens, lay_sentences, spread_places
from fulmen.data.lookup_words import JUDGED, Wording, draw_pairs
from fulmen.data.sequences import common_start, draw_sequences, token_ids
from fulmen.errors import ConfigError

# Worked examples where there is no chat template.
EXAMPLES = 2
# Begins as no question does: what it shares with all of them stands before the questions.
OTHER = "0"


@dataclass(frozen=True, eq=False)
class Lookup:
    """A question about a text.

    Attributes:
        question_ids: [Q] int64; follow the text's prefix, and end where the answer begins.
        answer_ids: [A] int64; the tokens of the answer that follow.
        answer: its string: who has written it has found it.
        depth: where in the text its sentence lies: 0 is the beginning, 1 the end.
    """

    question_ids: Tensor
    answer_ids: Tensor
    answer: str
    depth: float


@dataclass(frozen=True, eq=False)
class LookupText:
    """A text and the questions about it, each behind the same prefix.

    Attributes:
        name: the names of its documents.
        kind: of the documents.
        prefix_ids: [P] int64; what every prompt begins with: the text with its sentences.
        lookups: one for each key, in the order of the text.
    """

    name: str
    kind: str
    prefix_ids: Tensor
    lookups: tuple[Lookup, ...]


class Asked:
    """A conversation's form, and what of one wording is stated in a text and asked about it.

    Attributes:
        format: how the conversation is written.
        statements: the sentences to lay into the text.
        turns: question and answer for each of them.
    """

    def __init__(
        self,
        tokenizer: Any,
        wording: Wording,
        n_keys: int,
        generator: random.Random,
        text: str,
        frame: Frame = FRAME,
    ) -> None:
        """Draw keys, of which `text` has none if there are enough of them, and values."""
        n_examples = 0 if tokenizer.chat_template else EXAMPLES
        pairs = draw_pairs(wording, n_examples + n_keys, generator, text)
        examples = [
            Example(_statement(wording, pair), *_turn(wording, pair, "")) for pair in pairs[:n_examples]
        ]
        self.format: ConversationFormat = conversation_format(tokenizer, examples, frame)
        request = f" {wording.request}" if self.format.is_chat else ""
        self.statements = [_statement(wording, pair) for pair in pairs[n_examples:]]
        self.turns = [_turn(wording, pair, request) for pair in pairs[n_examples:]]


def lookup_texts(
    documents: Iterable[Document],
    tokenizer: Any,
    length: int,
    count: int,
    *,
    n_keys: int = 16,
    seed: int = 0,
    kind: str | None = None,
    wordings: Sequence[Wording] = JUDGED,
) -> list[LookupText]:
    """`count` texts with `n_keys` sentences of one form each, and a question for every one of them.

    Every prompt has at most `length` tokens, the longest one nearly so many. The same arguments give the same
    texts.

    Args:
        documents: held-out text.
        kind: of the documents; None: the kinds take turns.
        wordings: the forms, which the texts take in turn.

    Raises:
        ConfigError: a number that is not positive, more keys than there are, a length without room for them,
            or a chat template that cannot write a question.
        CorpusError: the documents do not fill `count` texts of `length` tokens.
    """
    require_positive_int("n_keys", n_keys)
    texts = []
    for number, sequence in enumerate(draw_sequences(documents, tokenizer, length, count, kind, seed)):
        generator = random.Random(f"{seed}/look-ups/{n_keys}/{number}")
        wording = wordings[number % len(wordings)]
        texts.append(_TextMaker(Haystack(sequence, tokenizer), wording, n_keys, length, generator).text())
    return texts


def no_room(length: int, n_keys: int, need: int) -> ConfigError:
    """The error for a length that cannot hold what is asked."""
    keys = f"{n_keys} sentences" if n_keys > 1 else "a sentence"
    return ConfigError(f"length={length} cannot hold {keys} and a question; use {need} or more")


class _TextMaker:
    """Fits one text into `length` tokens."""

    def __init__(
        self, haystack: Haystack, wording: Wording, n_keys: int, length: int, generator: random.Random
    ) -> None:
        self.haystack, self.length = haystack, length
        self.asked = Asked(haystack.tokenizer, wording, n_keys, generator, haystack.first(length))
        self.places = spread_places(n_keys, generator)

    def text(self) -> LookupText:
        rendered, prompts = self._fitted()
        # A question has a token at least, even where a vocabulary tells none of them apart.
        border = min(common_start(prompts[0], prompt[:-1]) for prompt in prompts)
        lookups = []
        for place, turn, string, ids in zip(self.places, self.asked.turns, rendered, prompts, strict=False):
            answer_ids = self._answer_ids(string, turn[1], ids)
            lookups.append(Lookup(_int64(ids[border:]), _int64(answer_ids), turn[1], place))
        sequence = self.haystack.sequence
        return LookupText(sequence.name, sequence.kind, _int64(prompts[0][:border]), tuple(lookups))

    def _fitted(self) -> tuple[list[str], list[list[int]]]:
        """The prompts, the one that asks `OTHER` last, and their tokens."""
        ids, n_keys = self.asked.format.ids, len(self.places)
        longest = max(self._questions, key=lambda question: len(ids(question)))
        n = fit_tokens(lambda n: len(ids(self._prompts(n, [longest])[0])), self.length)
        while n >= n_keys:
            rendered = self._prompts(n, self._questions)
            prompts = [ids(prompt) for prompt in rendered]
            excess = max(map(len, prompts)) - self.length
            if excess <= 0:
                return rendered, prompts
            n -= excess
        # Some text around each, and a blank where it lies within a line.
        need = len(ids(self._prompts(0, [longest])[0])) + 2 * n_keys
        raise no_room(self.length, n_keys, need)

    @cached_property
    def _questions(self) -> list[str]:
        return [*(question for question, _ in self.asked.turns), OTHER]

    def _prompts(self, n: int, questions: Sequence[str]) -> list[str]:
        text = lay_sentences(self.haystack.first(n), self.asked.statements, self.places)
        return [self.asked.format.prompt(text, (), question) for question in questions]

    def _answer_ids(self, prompt: str, answer: str, prompt_ids: list[int]) -> list[int]:
        """The answer's tokens; where some tokenizer joins it with the prompt's last one, alone."""
        written = self.asked.format.answer_text(answer)
        both = self.asked.format.ids(prompt + written)
        if both[: len(prompt_ids)] == prompt_ids:
            return both[len(prompt_ids) :]
        return token_ids(self.haystack.tokenizer, written)


def _statement(wording: Wording, pair: tuple[str, str]) -> str:
    return wording.statement.replace("{key}", pair[0]).replace("{value}", pair[1])


def _turn(wording: Wording, pair: tuple[str, str], request: str) -> Turn:
    key, value = pair
    question = wording.question.replace("{key}", key).replace("{value}", value)
    return question + request, key if wording.asks == "key" else value


def _int64(ids: Sequence[int]) -> Tensor:
    return torch.tensor(ids, dtype=torch.int64)
