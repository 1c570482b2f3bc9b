"""Sequences of tokens from documents: deterministic, apart from one another, spread over many files.

Tokenizing 30 MB takes minutes, so files are chosen first and only as many are tokenized as are needed.
"""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice, pairwise, zip_longest
from typing import Any

import torch
from torch import Tensor

from fulmen.config import require_positive_int
from fulmen.data.documents import Document
from fulmen.errors import ConfigError, CorpusError, DocumentTooShortError

# A long document is tokenized piece by piece; 16 characters a token are enough for any tokenizer.
PIECE_CHARACTERS = 100_000
CHARACTERS_PER_TOKEN = 16


@dataclass(frozen=True, eq=False)
class TokenSequence:
    """Tokens of one document, or of several short ones of one kind in a row.

    Attributes:
        names: the documents in it, in order; one unless it is packed.
        kind: of the documents.
        input_ids: [length] int64; begins with the tokenizer's BOS if that tokenizer writes one. In a packed
            sequence each document ends with EOS.
        starts: position of each document's first token; the first is 0.
        answers: (start, stop) of the tokens that answer a question about what is before them: places in
            `input_ids`, half-open. Each is predicted at the place before it.
    """

    names: tuple[str, ...]
    kind: str
    input_ids: Tensor
    starts: tuple[int, ...]
    answers: tuple[tuple[int, int], ...] = ()

    @property
    def name(self) -> str:
        """The names as one label."""
        return " + ".join(self.names)

    @property
    def position_ids(self) -> Tensor:
        """[length] int64: the place of each token in its document; tells a model where documents begin."""
        place_T = torch.arange(len(self.input_ids))
        starts_N = torch.tensor(self.starts)
        return place_T - starts_N[torch.searchsorted(starts_N, place_T, right=True) - 1]

    @property
    def predicts_answer(self) -> Tensor:
        """[length] bool: the places at which a token of an answer is predicted: one before each of them."""
        place_T = torch.arange(1, len(self.input_ids) + 1)
        within = [(place_T >= start) & (place_T < stop) for start, stop in self.answers]
        return torch.stack(within).any(0) if within else torch.zeros_like(place_T, dtype=torch.bool)


def draw_sequences(
    documents: Iterable[Document],
    tokenizer: Any,
    length: int,
    count: int,
    kind: str | None = None,
    seed: int = 0,
) -> list[TokenSequence]:
    """Draw `count` sequences of exactly `length` tokens, no token in two of them.

    They are the first of `iter_sequences`.

    Raises:
        ConfigError: `count` is not positive, or `length` as in `iter_sequences`.
        DocumentTooShortError: the documents do not fill even one sequence.
        CorpusError: they fill fewer than `count`, or as in `iter_sequences`.
    """
    require_positive_int("count", count)
    drawers = _drawers(documents, tokenizer, length, kind, seed)
    drawn = list(islice(_in_turns(drawers), count))
    if len(drawn) < count:
        tokens = sum(drawer.tokens for drawer in drawers)
        _raise_too_few([drawer.kind for drawer in drawers], tokens, len(drawn), length, count)
    return drawn


def iter_sequences(
    documents: Iterable[Document], tokenizer: Any, length: int, kind: str | None = None, seed: int = 0
) -> Iterator[TokenSequence]:
    """All the sequences that the documents fill, one by one; what is not asked for is not tokenized.

    Files are visited in a random order, each for one sequence before any is asked for a second. Documents
    too short for one are packed with others of their kind; what is left of the last one begins the next
    sequence. With `kind` None the kinds take turns until one is used up. The same documents (in any order),
    tokenizer and arguments give the same sequences in the same order.

    Raises:
        ConfigError: `length` is not positive, or holds BOS alone.
        CorpusError: there is no document of that kind, or documents must be packed and there is no EOS.
    """
    return _in_turns(_drawers(documents, tokenizer, length, kind, seed))


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text with no special ones around it, and no warning about its length."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def opening_ids(tokenizer: Any) -> list[int]:
    """What this tokenizer writes at the beginning of every text: [BOS] or nothing."""
    begins = tokenizer("")["input_ids"][:1]
    return begins if begins == [tokenizer.bos_token_id] else []


def common_start(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two texts share from the beginning on."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


def text_capacity(tokenizer: Any, length: int) -> int:
    """Tokens of text in a sequence of `length`. Raises ConfigError if there is none."""
    capacity = require_positive_int("length", length) - len(opening_ids(tokenizer))
    if capacity < 1:
        raise ConfigError(f"length={length} holds BOS and no text; use a longer sequence")
    return capacity


class Packer:
    """Documents end to end, each closed by EOS, and cut: what is left of one begins the next sequence.

    Attributes:
        held: (name, tokens, how many of them are used up) of the documents that wait for a full sequence.
    """

    def __init__(self, tokenizer: Any, capacity: int) -> None:
        self.tokenizer, self.capacity = tokenizer, capacity
        self.opening = opening_ids(tokenizer)
        self.held: list[tuple[str, list[int], int]] = []

    def add(self, name: str, ids: list[int]) -> None:
        """Put a document at the end. Raises CorpusError if the tokenizer has no EOS."""
        if not ids:
            return
        if self.tokenizer.eos_token_id is None:
            raise CorpusError(
                f"{name} is shorter than a sequence and the tokenizer has no EOS to pack documents with; "
                "set tokenizer.eos_token or use a shorter sequence"
            )
        self.held.append((name, [*ids, self.tokenizer.eos_token_id], 0))

    def full(self, kind: str) -> Iterator[TokenSequence]:
        """The sequences that are full; a document that is cut begins anew in the next one."""
        while sum(len(ids) - used for _, ids, used in self.held) >= self.capacity:
            yield self.sequence(kind, self._take())

    def sequence(self, kind: str, parts: list[tuple[str, list[int]]]) -> TokenSequence:
        """Parts that fill a sequence, behind BOS if this tokenizer writes one."""
        ids = self.opening + [token for _, part in parts for token in part]
        starts = [0]
        for _, part in parts[:-1]:
            starts.append(len(part) + (starts[-1] or len(self.opening)))
        names = tuple(name for name, _ in parts)
        return TokenSequence(names, kind, torch.tensor(ids, dtype=torch.int64), tuple(starts))

    def _take(self) -> list[tuple[str, list[int]]]:
        parts, missing = [], self.capacity
        while missing:
            name, ids, used = self.held.pop(0)
            part = ids[used : used + missing]
            parts.append((name, part))
            missing -= len(part)
            used += len(part)
        # A lone EOS is no document.
        if len(ids) - used > 1:
            self.held.insert(0, (name, ids, used))
        return parts


def _drawers(
    documents: Iterable[Document], tokenizer: Any, length: int, kind: str | None, seed: int
) -> list["_SequenceDrawer"]:
    """One per kind asked for."""
    capacity = text_capacity(tokenizer, length)
    kinds: dict[str, list[Document]] = {}
    for document in sorted(documents):
        kinds.setdefault(document.kind, []).append(document)
    chosen = sorted(kinds) if kind is None else [kind]
    if not kinds or not kinds.keys() >= set(chosen):
        have = f"has {' and '.join(sorted(kinds))}" if kinds else "is empty"
        raise CorpusError(f"no documents of {kind or 'any'} kind: this part of the corpus {have}; add text")
    return [_SequenceDrawer(name, kinds[name], tokenizer, capacity, seed) for name in chosen]


class _SequenceDrawer:
    """Draws sequences from the documents of one kind and counts the tokens it has met."""

    def __init__(
        self, kind: str, documents: list[Document], tokenizer: Any, capacity: int, seed: int
    ) -> None:
        self.kind = kind
        self.documents = documents
        self.tokenizer = tokenizer
        self.capacity = capacity
        self.random = random.Random(f"{seed}/{kind}")
        self.packer = Packer(tokenizer, capacity)
        self.tokens = 0

    def draw(self) -> Iterator[TokenSequence]:
        spare: list[tuple[str, list[int]]] = []
        for name, text in self._pieces():
            ids = token_ids(self.tokenizer, text)
            self.tokens += len(ids)
            if len(ids) < self.capacity:
                self.packer.add(name, ids)
                yield from self.packer.full(self.kind)
                continue
            first, *others = self._cut(ids)
            spare += [(name, other) for other in others]
            yield self.packer.sequence(self.kind, [(name, first)])
        self.random.shuffle(spare)
        yield from (self.packer.sequence(self.kind, [one]) for one in spare)

    def _pieces(self) -> Iterator[tuple[str, str]]:
        """(name, text), in rounds: one piece of every document, then a second one of those that have it."""
        files = [self._pieces_of(document) for document in self.documents]
        self.random.shuffle(files)
        rounds = chain.from_iterable(zip_longest(*files))
        return (piece for piece in rounds if piece is not None)

    def _pieces_of(self, document: Document) -> list[tuple[str, str]]:
        """A document's equal pieces, each long enough for a sequence, in random order."""
        name, _, text = document
        count = -(-len(text) // max(PIECE_CHARACTERS, 2 * CHARACTERS_PER_TOKEN * self.capacity))
        ends = [len(text) * k // count for k in range(count + 1)]
        pieces = [(name, text[start:end]) for start, end in pairwise(ends)]
        self.random.shuffle(pieces)
        return pieces

    def _cut(self, ids: list[int]) -> list[list[int]]:
        """As many sequences as fit, at a random offset, in random order."""
        offset = self.random.randrange(len(ids) % self.capacity + 1)
        starts = range(offset, len(ids) - self.capacity + 1, self.capacity)
        return [ids[start : start + self.capacity] for start in self.random.sample(starts, len(starts))]


def _in_turns(drawers: Iterable[_SequenceDrawer]) -> Iterator[TokenSequence]:
    waiting = [drawer.draw() for drawer in drawers]
    while waiting:
        for stream in list(waiting):
            sequence = next(stream, None)
            if sequence is None:
                waiting.remove(stream)
            else:
                yield sequence


def _raise_too_few(kinds: Sequence[str], tokens: int, drawn: int, length: int, count: int) -> None:
    have = f"the {' and '.join(kinds)} documents have {tokens} tokens"
    if not drawn:
        raise DocumentTooShortError(f"{have}, a sequence needs {length}; add text or use a shorter sequence")
    raise CorpusError(
        f"{have}, which fill {drawn} sequences of {length}; {count} are needed ({count * length} tokens): "
        "add text, or use fewer or shorter sequences"
    )
