"""Texts that ask and look up, made from any documents, to train with: many forms, several questions each."""

import random
import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from fulmen.data.conversations import ConversationFormat, Frame, Turn, keeps_turns
from fulmen.data.documents import Document
from fulmen.data.haystacks import Haystack, fit_tokens, lay_sentences, spread_places
from fulmen.data.lookup_words import FOLLOWS, TRAINED, Wording
from fulmen.data.lookups import Asked, no_room
from fulmen.data.sequences import TokenSequence, common_start, draw_sequences

MOST_KEYS, MOST_QUESTIONS, MOST_QUOTES = 16, 12, 3
# Words (in writing without blanks: characters) of a quoted place, and of what follows it.
CUE_WORDS, NEXT_WORDS = 8, 5
CUE_CHARACTERS, NEXT_CHARACTERS = 16, 8
TRIES = 20
# How a chat begins; none of them as what is judged.
FRAMES = (
    Frame("", "\n\n"),
    Frame("Here is a text.\n\n", "\n\nThat was the text. "),
    Frame("<document>\n", "\n</document>\n\n"),
    Frame("I will ask you about these notes.\n\n---\n", "\n---\n\n"),
    Frame("Context:\n", "\n\nUse the context above. "),
)


def lookup_sequences(
    documents: Iterable[Document],
    tokenizer: Any,
    length: int,
    count: int,
    *,
    seed: int = 0,
    kind: str | None = None,
    wordings: Sequence[Wording] = TRAINED,
) -> list[TokenSequence]:
    """`count` sequences of exactly `length` tokens: a text, and questions and answers about it.

    Each has sentences of one form in it (of many: names, places, settings in code; numbers, words, phrases,
    dates), asks for several of them, and for what follows a quoted place of the text itself. `answers` has
    where the answers are. What is left behind the conversation is filled with other text, as a document of
    its own. Half of a short length goes to the text, so that it asks less. There is one question where the
    chat template writes earlier turns anew.

    Args:
        documents: text for training.
        kind: of the documents; None: the kinds take turns.
        wordings: the forms; each text draws one.

    Raises:
        ConfigError: a number that is not positive, a length without room for a question, or a chat template
            that cannot write one.
        CorpusError: the documents do not fill `count` sequences of `length` tokens.
    """
    drawn = draw_sequences(documents, tokenizer, length, count, kind, seed)
    return [
        lookup_sequence(sequence, tokenizer, number, seed=seed, wordings=wordings)
        for number, sequence in enumerate(drawn)
    ]


def lookup_sequence(
    sequence: TokenSequence,
    tokenizer: Any,
    number: int,
    *,
    seed: int = 0,
    wordings: Sequence[Wording] = TRAINED,
) -> TokenSequence:
    """One of `lookup_sequences`, made from a sequence's own text, of its length.

    Args:
        number: of the sequence among its like: it decides the wording, keys, values and places.

    Raises ConfigError as `lookup_sequences`.
    """
    length = len(sequence.input_ids)
    generator = random.Random(f"{seed}/training look-ups/{length}/{number}")
    wording = generator.choice(wordings)
    return _SequenceMaker(Haystack(sequence, tokenizer), wording, length, generator).sequence()


class _SequenceMaker:
    """Fits one conversation into `length` tokens."""

    def __init__(self, haystack: Haystack, wording: Wording, length: int, generator: random.Random) -> None:
        self.haystack, self.length, self.generator = haystack, length, generator
        text = haystack.first(length)
        n_keys = generator.randint(4, MOST_KEYS)
        frame = generator.choice(FRAMES)
        self.asked = Asked(haystack.tokenizer, wording, n_keys, generator, text, frame)
        self.format: ConversationFormat = self.asked.format
        n_questions, self.n_quotes = generator.randint(4, MOST_QUESTIONS), generator.randint(0, MOST_QUOTES)
        self.keeps_turns = keeps_turns(self.format)
        if not self.keeps_turns:
            n_questions, self.n_quotes = 1, 0
        order = generator.sample(range(n_keys), n_keys)
        while True:
            kept = sorted(order[:n_keys])
            self.statements = [self.asked.statements[key] for key in kept]
            self.turns = [self.asked.turns[key] for key in order[: min(n_questions, n_keys)]]
            self.places = spread_places(n_keys, generator)
            if (need := self._tokens(0, self.turns)) <= length // 2:
                break
            if n_keys == 1:
                raise no_room(length, 1, 2 * need)
            n_keys, n_questions, self.n_quotes = n_keys // 2, max(1, n_questions // 2), self.n_quotes // 2

    def sequence(self) -> TokenSequence:
        """The conversation, and text that fills what it leaves."""
        turns = list(self.turns)
        n = fit_tokens(lambda n: self._tokens(n, turns), self.length)
        if quotes := self._quotes(self._body(n)):
            turns = self.generator.sample([*turns, *quotes], len(turns) + len(quotes))
            n = fit_tokens(lambda n: self._tokens(n, turns), self.length)
            body = self._body(n)
            # The text is shorter now, and its sentences lie elsewhere.
            turns = [turn for turn in turns if turn not in quotes or body.count(quotes[turn]) == 1]
        assert n >= 0, (self.length, n)
        return self._filled(*self._conversation(self._body(n), turns))

    def _body(self, n: int) -> str:
        return lay_sentences(self.haystack.first(n), self.statements, self.places)

    def _tokens(self, n: int, turns: Sequence[Turn]) -> int:
        return len(self.format.ids(self._rendered(self._body(n), turns)))

    def _rendered(self, text: str, turns: Sequence[Turn]) -> str:
        """The conversation; where it would be written otherwise when it is over, up to its last answer."""
        if self.keeps_turns:
            return self.format.whole(text, turns)
        question, answer = turns[-1]
        return self.format.prompt(text, turns[:-1], question) + self.format.answer_text(answer)

    def _conversation(self, text: str, turns: Sequence[Turn]) -> tuple[list[int], list[tuple[int, int]]]:
        """Its tokens, and where the answers are."""
        ids = self.format.ids(self._rendered(text, turns))
        answers = []
        for place, (question, answer) in enumerate(turns):
            prompt = self.format.prompt(text, turns[:place], question)
            start = common_start(self.format.ids(prompt), ids)
            answered = self.format.ids(prompt + self.format.answer_text(answer))
            stop = common_start(answered, ids)
            # A tokenizer may join an answer's end with what follows.
            answers.append((start, stop + (stop < len(answered))))
        return ids, answers

    def _filled(self, ids: list[int], answers: Sequence[tuple[int, int]]) -> TokenSequence:
        sequence, missing = self.haystack.sequence, self.length - len(ids)
        names, starts = [f"look-ups in {sequence.name}"], [0]
        if missing:
            ids = ids + sequence.input_ids[-missing:].tolist()
            names, starts = [*names, sequence.names[-1]], [0, self.length - missing]
        input_ids = torch.tensor(ids, dtype=torch.int64)
        return TokenSequence(tuple(names), sequence.kind, input_ids, tuple(starts), tuple(answers))

    def _quotes(self, text: str) -> dict[Turn, str]:
        """Questions for what follows a place that is there once, and the two together."""
        quotes: dict[Turn, str] = {}
        lines = [line for line in text.splitlines() if not any(one in line for one in self.statements)]
        for line in self.generator.sample(lines, min(TRIES, len(lines))):
            if len(quotes) == self.n_quotes:
                break
            if (parts := _quoted(line, self.generator)) and text.count(parts[0]) == 1:
                cue, following = parts
                question = self.generator.choice(FOLLOWS).replace("{cue}", cue)
                quotes[question, following.strip()] = cue + following
        return quotes


def _quoted(line: str, generator: random.Random) -> tuple[str, str] | None:
    """A random place of a line and what follows it; None if it is too short."""
    words = [match.span() for match in re.finditer(r"\S+", line)]
    sizes = (CUE_WORDS, NEXT_WORDS)
    if len(words) < sum(sizes):
        # Writing without blanks: one character each.
        words = [(place, place + 1) for place in range(len(line))]
        sizes = (CUE_CHARACTERS, NEXT_CHARACTERS)
        if len(words) < sum(sizes) or line.isascii():
            return None
    first = generator.randrange(len(words) - sum(sizes) + 1)
    start, middle, stop = (words[first][0], words[first + sizes[0] - 1][1], words[first + sum(sizes) - 1][1])
    return line[start:middle], line[middle:stop]
