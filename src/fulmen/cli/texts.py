"""The text of a run: one corpus from all of `--data`, or the demo corpus."""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from fulmen.corpus import Corpus, Document, Window, load_corpus, windows
from fulmen.errors import CorpusError


def load_texts(data: Sequence[str | Path]) -> Corpus:
    """Read and split every source; the demo corpus if there is none. Raises CorpusError as `load_corpus`."""
    corpora = [load_corpus(source) for source in data] or [load_corpus()]
    parts = {
        part: tuple(chain.from_iterable(getattr(corpus, part) for corpus in corpora))
        for part in ("calibration", "training", "heldout")
    }
    return Corpus(**parts, skipped=sum(corpus.skipped for corpus in corpora))


def kinds_of(documents: Sequence[Document]) -> list[str]:
    """Kinds of text among the documents, sorted."""
    return sorted({document.kind for document in documents})


def up_to(documents: Sequence[Document], tokenizer: Any, length: int, count: int, seed: int) -> list[Window]:
    """`count` windows, or fewer where the text ends; at least one. Raises CorpusError if there is not even one."""
    for wanted in range(count, 0, -1):
        try:
            return windows(documents, tokenizer, length, wanted, seed=seed)
        except CorpusError:
            if wanted == 1:
                raise
    raise AssertionError("unreachable: count is positive")
