"""Formulas of propositional logic: `P`, `not P`, `P and Q`, `P or Q`, `P -> Q`."""

import re
from typing import NamedTuple

LONGEST_TEXT = 120
_TOKEN = re.compile(r"\s*(->|→|\(|\)|[A-Z]\b|not\b|and\b|or\b)")
# Of two formulas, loosest first.
_BINARY = ("->", "or", "and")


class Formula(NamedTuple):
    """A letter (`sign` is it, no parts), or "not", "and", "or", "->" with its parts."""

    sign: str
    parts: tuple["Formula", ...] = ()

    def __str__(self) -> str:
        if not self.parts:
            return self.sign
        if self.sign == "not":
            return f"not {_inner(self.parts[0])}"
        left, right = self.parts
        return f"{_inner(left)} {self.sign} {_inner(right)}"


def negation(formula: Formula) -> Formula:
    """Its negation, without two nots in a row."""
    return formula.parts[0] if formula.sign == "not" else Formula("not", (formula,))


def joined(left: Formula, sign: str, right: Formula) -> Formula:
    """Two formulas with "and", "or" or "->" between them."""
    return Formula(sign, (left, right))


def formula_of(text: str) -> Formula:
    """Read a formula. Raises ValueError for what is none."""
    text = text.strip()
    tokens: list[str] = []
    place = 0
    while place < len(text):
        found = _TOKEN.match(text, place)
        if not found or len(text) > LONGEST_TEXT:
            raise ValueError(f"{text[:40]!r} is no formula")
        tokens.append("->" if found[1] == "→" else found[1])
        place = found.end()
    formula = _binary(tokens, 0)
    if tokens:
        raise ValueError(f"{text[:40]!r} is no formula")
    return formula


def _binary(tokens: list[str], level: int) -> Formula:
    if level == len(_BINARY):
        return _single(tokens)
    left = _binary(tokens, level + 1)
    if not tokens or tokens[0] != _BINARY[level]:
        return left
    sign = tokens.pop(0)
    # An arrow binds to the right; of the others the order is all one.
    return joined(left, sign, _binary(tokens, level))


def _single(tokens: list[str]) -> Formula:
    token = tokens.pop(0) if tokens else ""
    if token == "not":
        return Formula("not", (_single(tokens),))
    if token == "(":
        inner = _binary(tokens, 0)
        if not tokens or tokens.pop(0) != ")":
            raise ValueError("a bracket is not closed")
        return inner
    if len(token) != 1 or not token.isalpha():
        raise ValueError(f"{token!r} is no letter")
    return Formula(token)


def _inner(formula: Formula) -> str:
    return f"({formula})" if len(formula.parts) == 2 else str(formula)
