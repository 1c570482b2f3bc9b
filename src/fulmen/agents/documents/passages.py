"""Passages: a document's text cut at lines into pieces that a search returns. Together they are the text."""

from collections.abc import Iterator
from typing import NamedTuple

# A passage ends at an empty line from the first size on, at any line from the second, and else within a line.
ENDS_AT_BLANK, ENDS_AT_LINE, ENDS_ANYWHERE = 600, 1200, 2400


class PassageSpan(NamedTuple):
    """Where a piece of text is in its document.

    Lines count from 1, both ends included; characters from 0, the end not included.
    """

    first_line: int
    last_line: int
    first_character: int
    end_character: int

    @classmethod
    def of(cls, text: str, first_line: int, first_character: int) -> "PassageSpan":
        """The span of a piece that begins at a line and a character."""
        inner = text[:-1].count("\n")
        return cls(first_line, first_line + inner, first_character, first_character + len(text))


def passages_of(text: str) -> Iterator[tuple[str, PassageSpan]]:
    """Cut a text. Their texts, one after the other, are `text`."""
    line, begin, end = 1, 0, 0
    while begin < len(text):
        end = _end_of_passage(text, begin)
        body = text[begin:end]
        yield body, PassageSpan.of(body, line, begin)
        line, begin = line + body.count("\n"), end


def _end_of_passage(text: str, begin: int) -> int:
    limit = begin + ENDS_ANYWHERE
    if begin + ENDS_AT_LINE >= len(text):
        return len(text)
    blank = text.find("\n\n", begin + ENDS_AT_BLANK, begin + ENDS_AT_LINE)
    if blank >= 0:
        return blank + 2
    before = text.rfind("\n", begin + ENDS_AT_BLANK, begin + ENDS_AT_LINE)
    if before >= 0:
        return before + 1
    after = text.find("\n", begin + ENDS_AT_LINE, limit)
    return after + 1 if after >= 0 else min(limit, len(text))


def span_of(text: str, begin: int, end: int) -> PassageSpan:
    """The span of `text[begin:end]`, which is not empty."""
    return PassageSpan.of(text[begin:end], text.count("\n", 0, begin) + 1, begin)
