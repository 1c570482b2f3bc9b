"""Small Python functions to write, made up by code: what each does, a right one, and inputs to try it on."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

WORDS = (
    *(
        "amber",
        "bolt",
        "cedar",
        "dune",
        "ember",
        "fjord",
        "grove",
        "harbor",
        "iris",
        "jade",
        "kelp",
        "lagoon",
    ),
    *("meadow", "nectar", "orchid", "pebble", "quartz", "reef", "sand", "tide", "umber", "violet", "willow"),
)


@dataclass(frozen=True)
class Exercise:
    """One function to write.

    Attributes:
        name: of the function.
        arguments: its parameters, as in its signature.
        does: "returns …", for the prompt.
        body: lines of a right one.
        inputs: arguments of each test.
    """

    name: str
    arguments: str
    does: str
    body: tuple[str, ...]
    inputs: tuple[tuple[Any, ...], ...]

    @property
    def source(self) -> str:
        """A right function."""
        return "\n".join([f"def {self.name}({self.arguments}):", *(f"    {line}" for line in self.body)])


def draw_exercise(draw: random.Random, tests: int) -> Exercise:
    """An exercise of one of the families, with so many tests."""
    return draw.choice(FAMILIES)(draw, tests)


def _numbers(draw: random.Random, tests: int, least: int = -30) -> tuple[tuple[Any, ...], ...]:
    # One empty list: what many forget.
    lists = [[draw.randint(least, 60) for _ in range(draw.randint(1, 8))] for _ in range(tests - 1)]
    return ([],), *((one,) for one in lists)


def _word_lists(draw: random.Random, tests: int) -> tuple[tuple[Any, ...], ...]:
    return ([],), *((draw.choices(WORDS, k=draw.randint(1, 6)),) for _ in range(tests - 1))


def _texts(draw: random.Random, tests: int) -> tuple[tuple[Any, ...], ...]:
    return ("",), *((" ".join(draw.choices(WORDS, k=draw.randint(1, 3))),) for _ in range(tests - 1))


def _scale(draw: random.Random, tests: int) -> Exercise:
    k, c = draw.randint(2, 12), draw.randint(1, 50)
    does = f"returns a list with every number of xs multiplied by {k} and then raised by {c}"
    return Exercise("scale", "xs", does, (f"return [{k} * x + {c} for x in xs]",), _numbers(draw, tests))


def _multiples(draw: random.Random, tests: int) -> Exercise:
    k, words = draw.randint(2, 9), draw.choice((("keeps", "=="), ("drops", "!=")))
    does = f"returns a list that {words[0]} the numbers of xs that are divisible by {k}, in their order"
    body = (f"return [x for x in xs if x % {k} {words[1]} 0]",)
    return Exercise("select", "xs", does, body, _numbers(draw, tests))


def _count(draw: random.Random, tests: int) -> Exercise:
    k, words = draw.randint(-9, 40), draw.choice((("greater", ">"), ("less", "<")))
    does = f"returns how many numbers of xs are {words[0]} than {k}"
    return Exercise(
        "count", "xs", does, (f"return sum(x {words[1]} {k} for x in xs)",), _numbers(draw, tests)
    )


def _powers(draw: random.Random, tests: int) -> Exercise:
    k, power = draw.randint(-9, 40), draw.choice((2, 3))
    name = "squares" if power == 2 else "cubes"
    does = f"returns the sum of the {name} of those numbers of xs that are at most {k}"
    body = (f"return sum(x**{power} for x in xs if x <= {k})",)
    return Exercise("total", "xs", does, body, _numbers(draw, tests))


def _clamp(draw: random.Random, tests: int) -> Exercise:
    low, high = draw.randint(-20, 0), draw.randint(5, 45)
    does = f"returns xs with numbers below {low} replaced by {low}, and those above {high} by {high}"
    body = (f"return [min(max(x, {low}), {high}) for x in xs]",)
    return Exercise("clamp", "xs", does, body, _numbers(draw, tests))


def _rotate(draw: random.Random, tests: int) -> Exercise:
    k, side = draw.randint(1, 6), draw.choice(("left", "right"))
    does = f"returns the list xs rotated by {k} to the {side}; an empty list stays empty"
    start = f"{k} % len(xs)" if side == "left" else f"-{k} % len(xs)"
    body = ("if not xs:", "    return []", f"start = {start}", "return xs[start:] + xs[:start]")
    return Exercise("rotate", "xs", does, body, _numbers(draw, tests))


def _running(draw: random.Random, tests: int) -> Exercise:
    c = draw.randint(1, 90)
    does = f"returns the list of running totals of xs, where the total is {c} before the first number"
    body = (
        f"total, found = {c}, []",
        "for x in xs:",
        "    total += x",
        "    found.append(total)",
        "return found",
    )
    return Exercise("running", "xs", does, body, _numbers(draw, tests))


def _pairs(draw: random.Random, tests: int) -> Exercise:
    k = draw.randint(-10, 60)
    does = f"returns how many neighbours in xs, each with the next one, have a sum greater than {k}"
    body = (f"return sum(a + b > {k} for a, b in zip(xs, xs[1:]))",)
    return Exercise("pairs", "xs", does, body, _numbers(draw, tests))


def _longer(draw: random.Random, tests: int) -> Exercise:
    k, words = draw.randint(3, 6), draw.choice((("upper", "upper"), ("lower", "lower")))
    does = f"returns the words that have more than {k} letters, in {words[0]} case"
    body = (f"return [word.{words[1]}() for word in words if len(word) > {k}]",)
    return Exercise("longer", "words", does, body, _word_lists(draw, tests))


def _joined(draw: random.Random, tests: int) -> Exercise:
    k, mark = draw.randint(2, 4), draw.choice("-+/_;~")
    does = f"returns a string of all words, each written {k} times in a row, with {mark!r} between words"
    body = (f"return {mark!r}.join(word * {k} for word in words)",)
    return Exercise("joined", "words", does, body, _word_lists(draw, tests))


def _every(draw: random.Random, tests: int) -> Exercise:
    k, start = draw.randint(2, 5), draw.randint(0, 2)
    does = f"returns every {k}th character of text, beginning with the one at index {start}"
    return Exercise("every", "text", does, (f"return text[{start}::{k}]",), _texts(draw, tests))


def _replaced(draw: random.Random, tests: int) -> Exercise:
    mark, letters = draw.choice("*#?!%@"), "".join(draw.sample("aeiou", draw.randint(2, 4)))
    does = f"returns text with each of the letters {', '.join(letters)} replaced by {mark!r}"
    body = (f"return ''.join({mark!r} if c in {letters!r} else c for c in text)",)
    return Exercise("replaced", "text", does, body, _texts(draw, tests))


def _digits(draw: random.Random, tests: int) -> Exercise:
    k, numbers = draw.randint(2, 9), [0, *(draw.randint(1, 99_999) for _ in range(tests - 1))]
    does = f"returns {k} times the sum of the digits of the number n, which is not negative"
    body = (f"return {k} * sum(int(digit) for digit in str(n))",)
    return Exercise("digits", "n", does, body, tuple((number,) for number in numbers))


def _base(draw: random.Random, tests: int) -> Exercise:
    k, numbers = draw.randint(2, 9), [0, *(draw.randint(1, 9_999) for _ in range(tests - 1))]
    does = f"returns the number n, which is not negative, as a string of its digits in base {k}"
    body = (
        *("digits = ''", "while n:", f"    digits = str(n % {k}) + digits", f"    n //= {k}"),
        "return digits or '0'",
    )
    return Exercise("in_base", "n", does, body, tuple((number,) for number in numbers))


FAMILIES: tuple[Callable[[random.Random, int], Exercise], ...] = (
    *(_scale, _multiples, _count, _powers, _clamp, _rotate, _running, _pairs),
    *(_longer, _joined, _every, _replaced, _digits, _base),
)
