"""Rules of deduction: what one or two formulas give."""

from collections.abc import Callable, Iterator, Sequence
from itertools import permutations

from fulmen.tasks.proofs.formulas import Formula, joined, negation


def _ponens(first: Formula, second: Formula) -> Iterator[Formula]:
    """X -> Y and X give Y."""
    if first.sign == "->" and first.parts[0] == second:
        yield first.parts[1]


def _tollens(first: Formula, second: Formula) -> Iterator[Formula]:
    """X -> Y and not Y give not X."""
    if first.sign == "->" and negation(first.parts[1]) == second:
        yield negation(first.parts[0])


def _chain(first: Formula, second: Formula) -> Iterator[Formula]:
    """X -> Y and Y -> Z give X -> Z."""
    if first.sign == second.sign == "->" and first.parts[1] == second.parts[0]:
        yield joined(first.parts[0], "->", second.parts[1])


def _elimination(first: Formula, second: Formula) -> Iterator[Formula]:
    """X or Y and not X give Y; not Y gives X."""
    if first.sign == "or":
        left, right = first.parts
        if negation(left) == second:
            yield right
        if negation(right) == second:
            yield left


def _conjunction(first: Formula, second: Formula) -> Iterator[Formula]:
    """X and Y, each a line, give `X and Y`."""
    yield joined(first, "and", second)


def _simplification(first: Formula) -> Iterator[Formula]:
    """`X and Y` gives X, and Y."""
    if first.sign == "and":
        yield from first.parts


Rule = Callable[..., Iterator[Formula]]
OF_TWO: dict[str, Rule] = {
    "modus ponens": _ponens,
    "modus tollens": _tollens,
    "chain": _chain,
    "elimination": _elimination,
    "conjunction": _conjunction,
}
OF_ONE: dict[str, Rule] = {"simplification": _simplification}


def consequences(rule: str, lines: Sequence[Formula]) -> list[Formula] | None:
    """What a rule gives for lines, in any order; None if it does not take so many."""
    rules = {1: OF_ONE, 2: OF_TWO}.get(len(lines), {})
    if rule not in rules:
        return None
    return [given for order in permutations(lines) for given in rules[rule](*order)]


def follows_in_one_step(claim: Formula, lines: Sequence[Formula]) -> bool:
    """Whether it is one of the lines, or some rule gives it for some of them."""
    pairs = permutations(lines, 2)
    return (
        claim in lines
        or any(claim in rule(line) for line in lines for rule in OF_ONE.values())
        or any(claim in rule(*pair) for pair in pairs for rule in OF_TWO.values())
    )
