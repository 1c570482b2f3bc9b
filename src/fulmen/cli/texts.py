"""The texts of a run."""

from collections.abc import Sequence
from itertools import islice
from typing import Any

from fulmen.corpus import Document, Window, window_stream, windows


def kinds_of(documents: Sequence[Document]) -> list[str]:
    """Kinds of text among the documents, sorted."""
    return sorted({document.kind for document in documents})


def up_to(documents: Sequence[Document], tokenizer: Any, length: int, count: int, seed: int) -> list[Window]:
    """`count` windows, or fewer where the text ends. Raises CorpusError if there is not even one."""
    drawn = list(islice(window_stream(documents, tokenizer, length, seed=seed), count))
    return drawn or windows(documents, tokenizer, length, 1, seed=seed)
