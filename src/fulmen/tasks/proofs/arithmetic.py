"""What a written sum is worth: numbers, x, + - * / and brackets, exactly."""

import ast
import re
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

# Longer ones are nobody's honest step, and would take long to read.
LONGEST_TEXT = 120
_SIGNS = str.maketrans({"−": "-", "–": "-", "×": "*", "·": "*", "÷": "/"})
_ALLOWED = re.compile(r"[\dx+\-*/() ]+")


class Linear(NamedTuple):
    """The function slope * x + constant."""

    slope: Fraction
    constant: Fraction

    def plus(self, other: "Linear", sign: int = 1) -> "Linear":
        """This and `sign` times the other."""
        return Linear(self.slope + sign * other.slope, self.constant + sign * other.constant)

    def times(self, factor: Fraction) -> "Linear":
        """This, times a number."""
        return Linear(self.slope * factor, self.constant * factor)

    def __str__(self) -> str:
        if self.slope == 0:
            return str(self.constant)
        factor = {"1": "", "-1": "-"}.get(str(self.slope), str(self.slope))
        if self.constant == 0:
            return f"{factor}x"
        return f"{factor}x {'+' if self.constant > 0 else '-'} {abs(self.constant)}"


def plain_signs(text: str) -> str:
    """The text with a typewriter's signs in place of a printer's."""
    return text.translate(_SIGNS).strip()


def linear(text: str) -> Linear:
    """The value of a sum such as `3(2x + 4) - 5`. Raises ValueError for all that is none."""
    return _value(_parsed(text))


def expanded(text: str) -> str:
    """A sum with its brackets and products multiplied out: `6x + 12 - 5` of `3(2x + 4) - 5`.

    Raises ValueError for all that is none.
    """
    first, *others = map(str, _terms(_parsed(text), Fraction(1)))
    return first + "".join(f" - {one[1:]}" if one.startswith("-") else f" + {one}" for one in others)


def worked(text: str) -> str:
    """How a sum is worked out: `24 + 3 * 12 = 24 + 36 = 60`. Raises ValueError for all that is none."""
    return " = ".join(dict.fromkeys([text.strip(), expanded(text), str(linear(text))]))


def equation(text: str) -> tuple[Linear, Linear]:
    """The sides of an equation. Raises ValueError for what is none."""
    left, sign, right = text.partition("=")
    if not sign:
        raise ValueError(f"{text[:40]!r} is no equation")
    return linear(left), linear(right)


def _parsed(text: str) -> ast.expr:
    """Raises ValueError for what is no sum, before or after it is read."""
    text = plain_signs(text)
    if len(text) > LONGEST_TEXT or not _ALLOWED.fullmatch(text) or "**" in text or "//" in text:
        raise ValueError(f"{text[:40]!r} is no sum")
    # 3x, 3(x + 1) and (x + 1)(3) leave out a sign.
    text = re.sub(r"(?<=[\dx)])\s*(?=[x(])", "*", text)
    try:
        node = ast.parse(text, mode="eval").body
        _value(node)
    except (SyntaxError, ZeroDivisionError, RecursionError, MemoryError) as error:
        raise ValueError(f"{text[:40]!r} is no sum") from error
    return node


def _terms(node: ast.expr, factor: Fraction) -> Iterator[Linear]:
    """What a sum adds up, times a factor; brackets are multiplied out."""
    match node:
        case ast.BinOp(left=left, op=ast.Add() | ast.Sub() as sign, right=right):
            yield from _terms(left, factor)
            yield from _terms(right, factor if isinstance(sign, ast.Add) else -factor)
        case ast.BinOp(left=left, op=ast.Mult(), right=right) if _value(left).slope == 0:
            yield from _terms(right, factor * _value(left).constant)
        case _:
            yield _value(node).times(factor)


def _value(node: ast.expr) -> Linear:
    match node:
        case ast.Constant(value=int(number)):
            return Linear(Fraction(0), Fraction(number))
        case ast.Name(id="x"):
            return Linear(Fraction(1), Fraction(0))
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            return _value(inner).times(Fraction(-1))
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _value(left).plus(_value(right))
        case ast.BinOp(left=left, op=ast.Sub(), right=right):
            return _value(left).plus(_value(right), -1)
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            return _product(_value(left), _value(right))
        case ast.BinOp(left=left, op=ast.Div(), right=right):
            return _value(left).times(1 / _number(_value(right)))
    raise ValueError("no sum")


def _product(one: Linear, other: Linear) -> Linear:
    return other.times(one.constant) if one.slope == 0 else one.times(_number(other))


def _number(value: Linear) -> Fraction:
    if value.slope != 0:
        raise ValueError("not linear")
    return value.constant
