"""Text to hide sentences in: cut to fit a number of tokens, with the sentences at spread random places."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from fulmen.data.sequences import TokenSequence

# How often the text is cut anew, until the whole has the length asked for.
ROUNDS = 8


@dataclass(frozen=True)
class Haystack:
    """The text of a sequence of tokens, of which the first ones are used.

    Its documents are parted by empty lines; special tokens are left out, so that no text ends a turn.
    """

    sequence: TokenSequence
    tokenizer: Any

    def first(self, count: int) -> str:
        """The text of the first `count` tokens."""
        ids = self.sequence.input_ids[: max(count, 0)].tolist()
        bounds = [start for start in self.sequence.starts if start < len(ids)] + [len(ids)]
        parts = [
            self.tokenizer.decode(
                ids[start:stop], skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
            for start, stop in pairwise(bounds)
        ]
        # A cut through a character leaves some of its bytes.
        return "\n\n".join(parts).strip().strip("\ufffd").strip()


def spread_places(count: int, generator: random.Random) -> list[float]:
    """`count` random places between 0 and 1, in ascending order: one in each of so many equal stretches."""
    return [(stretch + generator.random()) / count for stretch in range(count)]


def lay_sentences(text: str, sentences: Sequence[str], places: Sequence[float]) -> str:
    """Put sentences into a text at about these places of it (0 to 1, ascending): between lines where there
    are any near, between words, or else where they fall."""
    laid, used = "", 0
    for place, sentence in zip(places, sentences, strict=True):
        cut, between_lines = _border(text, int(place * len(text)), used, len(text) // (2 * len(places)))
        laid += text[used:cut] + (f"{sentence}\n" if between_lines else f" {sentence} ")
        used = cut
    return laid + text[used:]


def fit_tokens(count_of: Callable[[int], int], length: int) -> int:
    """The most tokens of text whose whole has at most `length` tokens, or nearly so; below 0: none fits.

    Args:
        count_of: the tokens of the whole, given those of the text.
    """
    best, n = -1, length - count_of(0)
    for _ in range(ROUNDS):
        if n < 0 or n == best:
            break
        excess = count_of(n) - length
        if excess <= 0:
            best = max(best, n)
        if excess == 0:
            break
        n -= excess
        if best >= n:
            break
    return best


def _border(text: str, near: int, low: int, reach: int) -> tuple[int, bool]:
    """A place near `near` and not before `low`; whether it is the beginning of a line."""
    near = max(near, low)
    line = text.rfind("\n", max(low, near - reach), near) + 1
    if line > low or (near == 0):
        return line, True
    line = text.find("\n", near, near + reach) + 1
    if line:
        return line, True
    word = text.find(" ", near, near + reach)
    return (word, False) if word >= 0 else (near, False)
