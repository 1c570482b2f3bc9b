"""Documents, and their split into texts for calibration, for training, and held out."""

import hashlib
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from fulmen.errors import CorpusError

# What is judged must never have been seen: the held-out share is filled first.
SHARES = {"heldout": 0.30, "calibration": 0.10, "training": 0.60}
MIN_CHARACTERS = 6_000
LINE = 200


class Document(NamedTuple):
    """A text with its name (the same on every machine) and kind: "code", "prose" or "chat"."""

    name: str
    kind: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Documents in three disjoint parts, each in the order of the names.

    Attributes:
        calibration: about 10 % of the characters of every kind; inherit fits on it.
        training: about 60 %.
        heldout: about 30 %; every figure in a report comes from it.
        skipped: how many files and rows were left out, by reason.
    """

    calibration: tuple[Document, ...]
    training: tuple[Document, ...]
    heldout: tuple[Document, ...]
    skipped: Mapping[str, int] = field(default_factory=dict)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, in hex, of names, kinds and texts and of the split: equal if and only if the corpus is."""
        digest = hashlib.sha256()
        for part in (self.calibration, self.training, self.heldout):
            digest.update(b"%d documents" % len(part))
            for value in (value for document in part for value in document):
                raw = value.encode("utf-8", "surrogatepass")
                digest.update(b"%d:" % len(raw) + raw)
        return digest.hexdigest()


def split_documents(
    documents: Iterable[Document],
    placed: Iterable[tuple[Document, str]] = (),
    skipped: Mapping[str, int] | None = None,
) -> Corpus:
    """Split by file, kind by kind, in the order of the SHA-256 of the names; `placed` have their part.

    The split depends on the names and texts alone, not on their order. A text that occurs twice is kept once.
    A kind of only one or two documents is cut: the last three tenths of each are held out. A kind of fewer
    than 6000 characters is too small to judge with and goes to the training part whole.

    Raises:
        CorpusError: no kind is large enough to be split.
    """
    part_of = dict(placed)
    rows = _without_copies(part_of)
    texts = {row.text for row in rows}
    files = _without_copies(document for document in documents if document.text not in texts)
    _require_enough([*rows, *files])
    parts = {part: [row for row in rows if part_of[row] == part] for part in SHARES}
    for of_kind in _by_kind(files).values():
        if sum(len(document.text) for document in of_kind) < MIN_CHARACTERS:
            parts["training"] += of_kind
        else:
            (_deal if len(of_kind) >= len(SHARES) else _cut)(of_kind, parts)
    whole = {part: tuple(sorted(dealt)) for part, dealt in parts.items()}
    return Corpus(**whole, skipped=dict(skipped or {}))


def _require_enough(documents: Iterable[Document]) -> None:
    """Raise CorpusError unless one kind has 6000 characters."""
    sizes = {
        kind: sum(len(document.text) for document in of_kind) for kind, of_kind in _by_kind(documents).items()
    }
    if max(sizes.values(), default=0) < MIN_CHARACTERS:
        have = ", ".join(f"{size} characters of {kind}" for kind, size in sizes.items()) or "no text"
        raise CorpusError(f"the corpus has {have}; a split needs {MIN_CHARACTERS} of one kind: add text")


def _without_copies(documents: Iterable[Document]) -> list[Document]:
    """One document per text, of the copies the one whose name comes first; sorted."""
    by_text: dict[str, Document] = {}
    for document in sorted(documents):
        by_text.setdefault(document.text, document)
    return list(by_text.values())


def _by_kind(documents: Iterable[Document]) -> dict[str, list[Document]]:
    kinds: dict[str, list[Document]] = {}
    for document in documents:
        kinds.setdefault(document.kind, []).append(document)
    return kinds


def _deal(documents: list[Document], parts: dict[str, list[Document]]) -> None:
    """Fill the parts one after the other up to their share of the characters, each with at least one."""
    left = deque(sorted(documents, key=lambda document: hashlib.sha256(document.name.encode()).digest()))
    total = sum(len(document.text) for document in documents)
    waiting = len(parts)
    for part, share in SHARES.items():
        waiting -= 1
        room = share * total if waiting else total
        while len(left) > waiting and room > 0:
            parts[part].append(left.popleft())
            room -= len(parts[part][-1].text)


def _cut(documents: list[Document], parts: dict[str, list[Document]]) -> None:
    """Give each part one contiguous section of every document, the last one to the held-out part."""
    for name, kind, text in documents:
        end, share = 0, 0.0
        for part in reversed(SHARES):
            share += SHARES[part]
            start, end = end, _line_end(text, round(share * len(text)))
            if start < end:
                parts[part].append(Document(f"{name}#{part}", kind, text[start:end]))


def _line_end(text: str, near: int) -> int:
    """The end of the last line that ends in the 200 characters before `near`, else `near`."""
    return near if near == len(text) else text.rfind("\n", max(0, near - LINE), near) + 1 or near
