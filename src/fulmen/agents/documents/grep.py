"""Lines of documents that fit a regular expression, within a time limit.

By the package `regex`, whose matching can be ended: Python's own may run for hours. Two things that take all
memory are refused: groups that call one another, and counts within counts, which it writes out.
"""

import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import regex

from fulmen.errors import DocumentError

TIME_LIMIT_S = 5.0
MAX_PATTERN = 500
# Copies of a part of a pattern. A million take 300 MB.
MAX_COPIES = 100_000
_LEAST_COUNT = re.compile(r"\{\s*([0-9]+)")
_GROUP_CALL = re.compile(r"(?<!\\)\(\?(?:R\)|[+-]?[0-9]+\)|&|P>)")


class LineMatch(NamedTuple):
    """A line in which a pattern was found. line: from 1."""

    path: str
    line: int
    text: str


class GrepResult(NamedTuple):
    """What was found, and the documents that were not looked at to the end: for lack of time, or of room."""

    matches: list[LineMatch]
    unread: list[str]
    is_out_of_time: bool


def compiled(pattern: str, ignore_case: bool) -> "regex.Pattern[str]":
    """The pattern, `^` and `$` at each line. Raises DocumentError for one that is none or too large."""
    if not pattern or len(pattern) > MAX_PATTERN:
        raise DocumentError(f"pattern={pattern[:80]!r} cannot be; write 1 to {MAX_PATTERN} characters")
    if math.prod(max(1, int(count)) for count in _LEAST_COUNT.findall(pattern)) > MAX_COPIES:
        raise DocumentError(f"pattern={pattern[:80]!r} repeats more than {MAX_COPIES:,} times; use + or *")
    if call := _GROUP_CALL.search(pattern):
        raise DocumentError(
            f"pattern={pattern[:80]!r} has {call[0]!r}, a call of a group; write the group out"
        )
    try:
        return regex.compile(pattern, regex.MULTILINE | (regex.IGNORECASE if ignore_case else 0))
    except (regex.error, RecursionError, OverflowError, MemoryError) as error:
        raise DocumentError(f"pattern={pattern!r} is no regular expression ({error}); correct it") from error


def grep(
    paths: Sequence[str],
    text_of: Callable[[str], str],
    pattern: "regex.Pattern[str]",
    limit: int,
    seconds: float = TIME_LIMIT_S,
) -> GrepResult:
    """Look for a pattern in documents, line by line in order, until `limit` lines were found.

    Raises DocumentError for a pattern that needs more memory than there is.
    """
    ends = time.monotonic() + seconds
    found: list[LineMatch] = []
    for number, path in enumerate(paths):
        try:
            for match in _matching_lines(path, text_of(path), pattern, ends):
                if len(found) == limit:
                    return GrepResult(found, list(paths[number:]), False)
                found.append(match)
        except TimeoutError:
            return GrepResult(found, list(paths[number:]), True)
        except MemoryError as error:
            raise DocumentError(
                f"pattern={pattern.pattern[:80]!r} needs too much memory in {path}; make it simpler"
            ) from error
    return GrepResult(found, [], False)


def _matching_lines(path: str, text: str, pattern: "regex.Pattern[str]", ends: float) -> Iterator[LineMatch]:
    """Each line with a match once. Raises TimeoutError when the time is over."""
    line, counted, place = 1, 0, 0
    while place < len(text):
        left = ends - time.monotonic()
        if left <= 0:
            raise TimeoutError
        match = pattern.search(text, place, timeout=left)
        if match is None:
            return
        line, counted = line + text.count("\n", counted, match.start()), match.start()
        end = text.find("\n", match.start())
        end = len(text) if end < 0 else end
        yield LineMatch(path, line, text[text.rfind("\n", 0, match.start()) + 1 : end])
        place = end + 1
