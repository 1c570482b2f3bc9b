"""Quotes that a model gave, looked up in the documents: those found word for word become citations."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from fulmen.agents.documents.index import DocumentIndex
from fulmen.agents.documents.passages import PassageSpan, span_of
from fulmen.errors import DocumentError

# Fewer characters are found in any document; more are no quote.
SHORTEST, LONGEST = 8, 10_000
# Characters shown before a citation, and after it.
SURROUNDINGS = 1500
# What models put around a quote.
AROUND = " \t\n\"'`“”‘’«»…"


@dataclass(frozen=True)
class Quote:
    """Words that a model says are in a file."""

    file: str
    text: str


@dataclass(frozen=True)
class Citation:
    """Words that are in a document.

    file: its path in the folder. quote: as the document has them. span: where: lines from 1, both ends
    included; characters from 0, the end not included. before, after: what stands around them, up to 1,500
    characters each, in whole lines where there are some.
    """

    file: str
    quote: str
    span: PassageSpan
    before: str = field(default="", compare=False, repr=False)
    after: str = field(default="", compare=False, repr=False)


@dataclass(frozen=True)
class Dropped:
    """A quote that is no citation, and why."""

    file: str
    quote: str
    reason: str


def checked_citations(quotes: Iterable[Quote], index: DocumentIndex) -> tuple[list[Citation], list[Dropped]]:
    """Split quotes into citations and those that are dropped.

    Words must be the same; white space may differ, since lines are broken otherwise. A quote from another
    document than the one named is cited from where it is.
    """
    found: list[Citation] = []
    dropped: list[Dropped] = []
    for quote in quotes:
        words = quote.text.strip(AROUND)
        if len(words) < SHORTEST:
            dropped.append(Dropped(quote.file, quote.text, f"shorter than {SHORTEST} characters"))
        elif len(words) > LONGEST:
            dropped.append(Dropped(quote.file, quote.text, f"longer than {LONGEST:,} characters"))
        elif (citation := _found(quote.file, words, index)) is None:
            dropped.append(Dropped(quote.file, quote.text, "not in the documents"))
        elif citation not in found:
            found.append(citation)
    return found, dropped


def _found(file: str, words: str, index: DocumentIndex) -> Citation | None:
    pattern = re.compile(r"\s+".join(map(re.escape, words.split())))
    for path in dict.fromkeys([file, *_likely_files(words, index)]):
        try:
            text = index.text(path)
        except DocumentError:
            continue
        if match := pattern.search(text):
            span = span_of(text, *match.span())
            return Citation(path, match[0], span, _before(text, match.start()), _after(text, match.end()))
    return None


def _before(text: str, end: int) -> str:
    """What stands before a place, from the beginning of a line on if one begins there."""
    begin = max(0, end - SURROUNDINGS)
    line = text.find("\n", begin, end) + 1 if begin else 0
    return text[line or begin : end]


def _after(text: str, begin: int) -> str:
    """What stands behind a place, to the end of a line if one ends there."""
    end = begin + SURROUNDINGS
    line = text.rfind("\n", begin, end) if end < len(text) else -1
    return text[begin : end if line < 0 else line]


def _likely_files(words: str, index: DocumentIndex) -> list[str]:
    try:
        return [found.path for found in index.search(words[:400])]
    except DocumentError:
        return []
