"""Sequences from data sets too large to hold: packed on the fly, from a position that can be saved."""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from fulmen.data.data_sets import DataSet, DataSets
from fulmen.data.documents import Document
from fulmen.data.rows import part_of, row_document
from fulmen.data.sequences import Packer, TokenSequence, text_capacity, token_ids


class SequenceStream:
    """The sequences of one part of the data sets, in the order of their rows; every iteration is a pass.

    A pass goes on from the position where the last one stopped, or from a loaded one. Data sets that are
    behind it are not opened again; within one, `datasets` passes over the rows and nothing is tokenized.

    Attributes:
        skipped: rows left out in the first pass, by reason. passes: how many have been finished.
        made: sequences so far, in all passes. change: given a sequence and its number, makes the one that is
            read; by default the same.
    """

    def __init__(self, data_sets: DataSets, tokenizer: Any, length: int, part: str = "training") -> None:
        """Raises ConfigError for a length that cannot be."""
        self.data_sets, self.tokenizer, self.length, self.part = data_sets, tokenizer, length, part
        self.packer = Packer(tokenizer, text_capacity(tokenizer, length))
        self.skipped: Counter[str] = Counter()
        self.passes = self.texts = self.member = self.row = self.made = 0
        self.change: Callable[[TokenSequence, int], TokenSequence] = lambda sequence, number: sequence
        self.field: str | None = None
        self.rows: dict[str, Any] | None = None

    def __iter__(self) -> Iterator[TokenSequence]:
        """The sequences of one pass; what does not fill the last one begins the next pass's first.

        Raises:
            CorpusError: a data set cannot be read, or a pass met no text.
        """
        yield from self._full()
        for document in self._documents():
            self.packer.add(document.name, token_ids(self.tokenizer, document.text))
            yield from self._full()

    def _full(self) -> Iterator[TokenSequence]:
        for sequence in self.packer.full("rows"):
            self.made += 1
            yield self.change(sequence, self.made - 1)

    def state_dict(self) -> dict[str, Any]:
        """The position behind the last sequence: what JSON can hold."""
        return {
            "made": self.made,
            "passes": self.passes,
            "texts": self.texts,
            "member": self.member,
            "field": self.field,
            "row": self.row,
            "rows": self.rows,
            "held": list(self.packer.held),
            "skipped": dict(self.skipped),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a position of a stream over the same data, tokenizer and length."""
        self.made = state["made"]
        self.passes, self.texts, self.member = state["passes"], state["texts"], state["member"]
        self.field, self.row, self.rows = state["field"], state["row"], state["rows"]
        self.packer.held = [(name, ids, used) for name, ids, used in state["held"]]
        self.skipped = Counter(state["skipped"])

    def _documents(self) -> Iterator[Document]:
        while self.member < len(self.data_sets.members):
            yield from self._documents_of(self.data_sets.members[self.member])
            self._at_member(self.member + 1)
        if not self.texts:
            raise self.data_sets.nothing_left(self.skipped)
        self.passes, self.texts = self.passes + 1, 0
        self._at_member(0)

    def _documents_of(self, member: DataSet) -> Iterator[Document]:
        """From the position on, which moves along."""
        opened = member.open()
        if self.field is None:
            self.field = member.field(opened)
        if self.rows is not None:
            opened.load_state_dict(self.rows)
        skipped = Counter[str]() if self.passes else self.skipped
        for row in member.rows(opened):
            self.rows, self.row = opened.state_dict(), self.row + 1
            document = row_document(f"{member.name}:{self.row}", row.get(self.field), skipped)
            if document is not None and part_of(document.text) == self.part:
                self.texts += 1
                yield document

    def _at_member(self, number: int) -> None:
        self.member, self.field, self.row, self.rows = number, None, 0, None
