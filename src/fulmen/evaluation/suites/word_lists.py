"""RULER's aggregation tasks (arXiv 2404.06654, section 3.3): a long list of words, some of them frequent."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain

from fulmen.data import Document
from fulmen.errors import ConfigError
from fulmen.evaluation.suites.samples import PromptSpec, TaskContext

COMMON = 10
# How often a common and another word occur: RULER's 30 and 3 where there is room, else the same 10 : 1.
REPEATS = ((30, 3), (10, 1))
FREQUENT, RANKS, ZETA = 3, 100, 2.0
SYLLABLES = tuple(consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou")
VOCABULARY = 3_000


def vocabulary(documents: Iterable[Document]) -> tuple[str, ...]:
    """Words of 4 to 8 letters, all lower case, the most frequent of the documents first."""
    words = Counter(chain.from_iterable(re.findall(r"\b[a-z]{4,8}\b", text) for _, _, text in documents))
    ordered = sorted(words, key=lambda word: (-words[word], word))
    return tuple(ordered[:VOCABULARY])


def common_words(context: TaskContext) -> PromptSpec:
    """The ten words that occur ten times as often as every other one."""
    shuffled = context.random.sample(context.words, len(context.words))
    others = chain(shuffled, _made_up(context, set(shuffled)))
    common = tuple(next(others) for _ in range(COMMON))

    def words(available: int) -> list[list[int]]:
        often, seldom = _repeats(context, common, available)
        pieces = [context.ids(f" {word}") for word in common for _ in range(often)]
        left = available - sum(map(len, pieces))
        for word in others:
            piece = context.ids(f" {word}")
            left -= seldom * len(piece)
            if left < 0:
                break
            pieces += [piece] * seldom
        context.random.shuffle(pieces)
        return pieces

    before = (
        "List: apple river apple stone river apple river\n"
        "Question: which two words occur most often in the list above?\nAnswer: apple, river\n\nList:"
    )
    question = "\n\nQuestion: which ten words occur most often in the list above?\nAnswer:"
    return PromptSpec((), question, common, before, words)


def frequent_words(context: TaskContext) -> PromptSpec:
    """The three most frequent of made-up words whose counts fall as Zeta(2): word r occurs ~ 1 / r² times."""
    made_up = _made_up(context, set())
    ranked = [next(made_up) for _ in range(RANKS)]

    def words(available: int) -> list[list[int]]:
        pieces = [context.ids(f" {word}") for word in ranked]
        costs = [len(piece) for piece in pieces]

        def fits(n: int) -> bool:
            return sum(c * k for c, k in zip(costs, zeta_counts(n), strict=True)) <= available

        total = _most(fits, available)
        counts = zeta_counts(total)
        if len(set(counts[: FREQUENT + 1])) <= FREQUENT:
            raise ConfigError(f"{available} tokens are too few for frequent words; use a longer length")
        listed = [piece for piece, count in zip(pieces, counts, strict=True) for _ in range(count)]
        context.random.shuffle(listed)
        return listed

    before = (
        "Coded text: ximewo quyaju ximewo ximewo quyaju wuxexi\n"
        "Question: which two coded words occur most often in the text above?\n"
        "Answer: ximewo, quyaju\n\nCoded text:"
    )
    question = "\n\nQuestion: which three coded words occur most often in the text above?\nAnswer:"
    return PromptSpec((), question, tuple(ranked[:FREQUENT]), before, words)


def zeta_counts(total: int) -> list[int]:
    """About `total` occurrences over the ranks 1, 2, ...: shares fall as 1 / rank²."""
    weights = [rank**-ZETA for rank in range(1, RANKS + 1)]
    return [int(total * weight / sum(weights)) for weight in weights]


def _repeats(context: TaskContext, common: Sequence[str], available: int) -> tuple[int, int]:
    """The most occurrences that leave half of the room to other words."""
    cost = sum(len(context.ids(f" {word}")) for word in common)
    for often, seldom in REPEATS:
        if often * cost <= available // 2:
            return often, seldom
    need = 2 * REPEATS[-1][0] * cost
    raise ConfigError(f"{available} tokens are too few for common words; use {need} or more")


def _most(fits: Callable[[int], bool], limit: int) -> int:
    """The largest n <= limit that fits, by bisection; 0 always does."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _made_up(context: TaskContext, taken: set[str]) -> Iterator[str]:
    """Words of three syllables that are none; no word twice."""
    while True:
        word = "".join(context.random.sample(SYLLABLES, 3))
        if word not in taken:
            taken.add(word)
            yield word
