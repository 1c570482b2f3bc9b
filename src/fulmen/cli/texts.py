"""The texts of a run."""

from collections.abc import Sequence
from itertools import islice
from typing import Any

from fulmen.corpus import Document, Window, window_stream, windows
from fulmen.errors import ConfigError


def kinds_of(documents: Sequence[Document]) -> list[str]:
    """Kinds of text among the documents, sorted."""
    return sorted({document.kind for document in documents})


def up_to(documents: Sequence[Document], tokenizer: Any, length: int, count: int, seed: int) -> list[Window]:
    """`count` windows, or fewer where the text ends. Raises CorpusError if there is not even one."""
    drawn = list(islice(window_stream(documents, tokenizer, length, seed=seed), count))
    return drawn or windows(documents, tokenizer, length, 1, seed=seed)


def split_off(drawn: Sequence[Window], n_held_out: int, stage: str) -> tuple[list[Window], list[Window]]:
    """What a stage trains on, and the first windows, held out: `n_held_out`, or half of a few.

    Raises ConfigError if there is but one.
    """
    n_held_out = min(n_held_out, len(drawn) // 2)
    if not n_held_out:
        length = len(drawn[0].input_ids)
        raise ConfigError(f"the training text fills one window of {length} tokens; {stage} needs 2: add text")
    return list(drawn[n_held_out:]), list(drawn[:n_held_out])
