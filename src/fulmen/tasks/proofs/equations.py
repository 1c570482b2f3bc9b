"""Linear equations in x, solved step by step: expand, collect, subtract, divide."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from random import Random

from fulmen.tasks.proofs.arithmetic import Linear, equation, linear, worked
from fulmen.tasks.proofs.proof import REASON, RIGHT, SLIP, WRONG, Finding, Proof, Step

Sides = tuple[Linear, Linear]

_MOVE = re.compile(r"(add|subtract) (.+) (?:to|from) both sides", re.IGNORECASE)
_SCALE = re.compile(r"(multiply|divide) both sides by (.+)", re.IGNORECASE)
_REWRITE = re.compile(r"(expand|collect|simplify)\b.*", re.IGNORECASE)
_GIVEN = re.compile(r"^Solve for x: (.+)$", re.MULTILINE)
LARGEST, LARGEST_SOLUTION = 999, 15


class Equations:
    """`Solve for x: 3(2x + 4) + 5 = 4x + 33`."""

    name = "equations"
    faults: tuple[str, ...] = ("sign", "one side", "arithmetic", "distribution")
    shortest, longest = 2, 6
    form = (
        "A step is an equation with what was done to get it from the one before: "
        "`expand the left side`, `collect terms on the left side`, `subtract 4x from both sides`, "
        "`add 7 to both sides`, `multiply both sides by 2`, `divide both sides by 2`. "
        "For example: `subtract 4x from both sides: 2x + 17 = 33`. "
        "The last step is `x = ` and a whole number."
    )

    def faults_of(self, n_steps: int) -> tuple[str, ...]:
        """As `ProofKind.faults_of`."""
        able = {fault for operation in _OPERATIONS[n_steps] for fault in _FAULTS_OF[operation]}
        return tuple(fault for fault in self.faults if fault in able)

    def draw(self, random: Random, n_steps: int, fault: str | None) -> Proof | None:
        """As `ProofKind.draw`."""
        work = _start(random, n_steps)
        solution = _solution(str(work))
        problem = f"Solve for x: {work}"
        operations = _OPERATIONS[n_steps]
        able = [place for place, one in enumerate(operations) if fault in (*_FAULTS_OF[one], REASON)]
        at = random.choice(able) if fault else None
        steps = []
        for place, operation in enumerate(operations):
            done = _DO[operation](work, random, fault if place == at else None)
            if done is None or not done[1].is_small():
                return None
            reason, work = done
            steps.append(Step(reason, str(work)))
        found = _solution(str(work))
        if solution is None or found is None or (found == solution) == (fault in self.faults):
            return None
        # Of faulty proofs few with a large divisor end in a whole number; so there are few sound ones, too.
        if fault not in self.faults and random.random() * abs(_divisor(steps)) > 1:
            return None
        return Proof(self.name, problem, tuple(steps))

    def check(self, problem: str, steps: Sequence[Step]) -> list[Finding]:
        """As `ProofKind.check`."""
        found = _GIVEN.search(problem)
        before = found[1] if found else ""
        findings = []
        for step in steps:
            findings.append(_finding(before, step))
            before = step.claim
        return findings

    def is_finished(self, problem: str, steps: Sequence[Step]) -> bool:
        """As `ProofKind.is_finished`."""
        last = _sides(steps[-1].claim)
        return last is not None and last[0] == Linear(Fraction(1), Fraction(0)) and last[1].slope == 0


def _finding(given: str, step: Step) -> Finding:
    """given: the equation before, as written."""
    before, claimed = _sides(given), _sides(step.claim)
    if before is None or claimed is None:
        return Finding(WRONG, "that is no equation which could be read")
    expected = _applied(before, step.reason)
    if expected is None:
        score = SLIP if _is_one_step(before, claimed) else WRONG
        return Finding(score, "that is no operation on both sides")
    worked_out = zip(given.split("="), expected, strict=True)
    left, right = (_work(side.strip(), step.reason.strip(), value) for side, value in worked_out)
    remark = f"left {left}, right {right}; claimed {step.claim}"
    if claimed == expected:
        return Finding(RIGHT, remark)
    if _is_one_step(before, claimed):
        return Finding(SLIP, f"{remark}, by another operation")
    return Finding(WRONG, remark)


def _work(side: str, reason: str, value: Linear) -> str:
    """A side, what the reason does to it, and the value that this gives: `2x + 17 - 17 = 2x`."""
    if found := _MOVE.fullmatch(reason):
        return f"{side} {'+' if found[1].lower() == 'add' else '-'} {_bracketed(found[2])} = {value}"
    if found := _SCALE.fullmatch(reason):
        sign = "*" if found[1].lower() == "multiply" else "/"
        return f"{_bracketed(side)} {sign} {_bracketed(found[2])} = {value}"
    return worked(side)


def _bracketed(text: str) -> str:
    """A sum of several terms, or what has a sign of its own, in brackets."""
    return f"({text})" if re.search(r"[-+*/]", text) else text


def _applied(before: Sides, reason: str) -> Sides | None:
    """The sides after what a reason says; None if it says nothing that can be done."""
    left, right = before
    try:
        if found := _MOVE.fullmatch(reason.strip()):
            moved, sign = linear(found[2]), 1 if found[1].lower() == "add" else -1
            return left.plus(moved, sign), right.plus(moved, sign)
        if found := _SCALE.fullmatch(reason.strip()):
            by = linear(found[2])
            if by.slope != 0 or by.constant == 0:
                return None
            factor = by.constant if found[1].lower() == "multiply" else 1 / by.constant
            return left.times(factor), right.times(factor)
    except ValueError:
        return None
    return before if _REWRITE.fullmatch(reason.strip()) else None


def _is_one_step(before: Sides, claimed: Sides) -> bool:
    """Whether some one operation leads there: the same added to both sides, or both times one number."""
    if claimed[0].plus(before[0], -1) == claimed[1].plus(before[1], -1):
        return True
    pairs = [
        pair for one, other in zip(before, claimed, strict=True) for pair in zip(one, other, strict=True)
    ]
    factor = next((new / old for old, new in pairs if old != 0), Fraction(0))
    return factor != 0 and all(new == factor * old for old, new in pairs)


def _divisor(steps: Sequence[Step]) -> Fraction:
    """By what the last step of a proof divides."""
    before = equation(steps[-2].claim)
    return before[0].slope


def _solution(text: str) -> int | None:
    """The one solution; None unless it is a small whole number, as another one would tell of a fault."""
    left, right = equation(text)
    slope, constant = left.plus(right, -1)
    solution = -constant / slope if slope else Fraction(1, 2)
    return int(solution) if solution.denominator == 1 and abs(solution) <= LARGEST_SOLUTION else None


def _sides(text: str) -> Sides | None:
    try:
        return equation(text)
    except ValueError:
        return None


@dataclass(frozen=True)
class _Work:
    """`factor(p x + q) + r = factor(p x + q)` or, where there are no brackets, sums of terms, as written.

    left, right: terms: (coefficient, "x"), (coefficient, ""), or (factor, p, q) in brackets.
    """

    left: tuple[tuple, ...]
    right: tuple[tuple, ...]

    def __str__(self) -> str:
        return f"{_written(self.left)} = {_written(self.right)}"

    def is_small(self) -> bool:
        """Whether numbers are those of school, and no side is empty."""
        return all(abs(number) <= LARGEST for side in (self.left, self.right) for number in _numbers(side))


def _numbers(side: Sequence[tuple]) -> list[int]:
    return [number for term in side for number in term if isinstance(number, int)]


def _written(side: Sequence[tuple]) -> str:
    """A sum; terms of zero are left out."""
    text = ""
    for term in side:
        if term[0] == 0:
            continue
        size = abs(term[0])
        if len(term) == 3:
            body = f"{size}({_written(((term[1], 'x'), (term[2], '')))})"
        else:
            body = f"{'' if size == 1 and term[1] else size}{term[1]}"
        sign = "-" if term[0] < 0 else "+"
        text += f" {sign} {body}" if text else f"{'-' if term[0] < 0 else ''}{body}"
    return text or "0"


def _start(random: Random, n_steps: int) -> _Work:
    """An equation that takes so many steps, and mostly has a whole number as its solution."""
    solution = random.randint(-LARGEST_SOLUTION, LARGEST_SOLUTION)

    def bracket() -> tuple[int, int, int]:
        return random.randint(2, 6), random.randint(1, 4), random.choice([-7, -5, -4, -3, -2, 2, 3, 4, 5, 7])

    def worth(terms: Sequence[tuple]) -> int:
        return sum(
            t[0] * (t[1] * solution + t[2]) if len(t) == 3 else t[0] * (solution if t[1] else 1)
            for t in terms
        )

    first: tuple = (random.randint(2, 9), "x")
    left: tuple[tuple, ...] = (first,) if n_steps <= 3 else (bracket(),)
    if n_steps in (5, 6):
        left = (*left, (random.choice([-8, -5, -3, 3, 5, 8, 9]), ""))
    if n_steps <= 3:
        left = (*left, (random.choice([-1, 1]) * random.randint(1, 30), ""))
    if n_steps == 6:
        factor, slope = random.randint(2, 4), random.randint(1, 3)
        rest = worth(left) - factor * slope * solution
        return _Work(left, ((factor, slope, rest // factor),))
    right: tuple[tuple, ...] = () if n_steps == 2 else ((random.choice([-1, 1]) * random.randint(2, 9), "x"),)
    return _Work(left, (*right, (worth(left) - worth(right), "")))


Done = tuple[str, _Work] | None


def _expand(side: str) -> Callable[[_Work, Random, str | None], Done]:
    def expand(work: _Work, random: Random, fault: str | None) -> Done:
        (factor, slope, constant), *rest = getattr(work, side)
        inner = constant if fault == "distribution" else factor * constant
        terms = ((factor * slope, "x"), (inner, ""), *rest)
        reason = f"expand the {side} side"
        if fault == REASON:
            reason = f"divide both sides by {factor}"
        return reason, _with(work, side, _off(terms, random) if fault == "arithmetic" else terms)

    return expand


def _collect(work: _Work, random: Random, fault: str | None) -> Done:
    slope = sum(term[0] for term in work.left if term[1])
    constants = [term[0] for term in work.left if not term[1]]
    constant = constants[0] - sum(constants[1:]) if fault == "sign" else sum(constants)
    terms = ((slope, "x"), (constant, ""))
    reason = "collect terms on the left side"
    if fault == REASON:
        reason = f"subtract {abs(constants[-1])} from both sides"
    return reason, _with(work, "left", _off(terms, random) if fault == "arithmetic" else terms)


def _move(unit: str) -> Callable[[_Work, Random, str | None], Done]:
    """Take the x from the right side, or the constant from the left."""

    def move(work: _Work, random: Random, fault: str | None) -> Done:
        source = work.right if unit else work.left
        amount = sum(term[0] for term in source if term[1] == unit)
        if amount == 0:
            return None
        sums = {
            (side, kind): sum(term[0] for term in getattr(work, side) if term[1] == kind)
            for side in ("left", "right")
            for kind in ("x", "")
        }
        emptied, other = ("right", "left") if unit else ("left", "right")
        sums[emptied, unit] = 0
        sums[other, unit] -= {"sign": -amount, "one side": 0}.get(str(fault), amount)
        if fault == "arithmetic":
            sums[other, unit] += random.choice([-10, -2, -1, 1, 2, 10])
        named = amount if fault != REASON else _another(amount, random)
        verb, way = ("subtract", "from") if named > 0 else ("add", "to")
        reason = f"{verb} {_written(((abs(named), unit),))} {way} both sides"
        left, right = (
            tuple((sums[side, kind], kind) for kind in ("x", "") if sums[side, kind])
            for side in ("left", "right")
        )
        return reason, _Work(left, right)

    return move


def _divide(work: _Work, random: Random, fault: str | None) -> Done:
    if len(work.left) != 1 or work.left[0][1] != "x" or any(term[1] for term in work.right):
        return None
    factor = work.left[0][0]
    total = sum(term[0] for term in work.right)
    if factor in (0, 1) or total % factor:
        return None
    result = total if fault == "one side" else total // factor
    if fault == "arithmetic":
        result += random.choice([-2, -1, 1, 2])
    named = factor if fault != REASON else _another(factor, random)
    return f"divide both sides by {named}", _Work(((1, "x"),), ((result, ""),) if result else ())


def _another(number: int, random: Random) -> int:
    """Of the same sign."""
    return random.choice([n for n in (number - 2, number - 1, number + 1, number + 2) if n * number > 0])


def _off(terms: tuple[tuple, ...], random: Random) -> tuple[tuple, ...]:
    """Terms, one of them miscalculated."""
    place = random.randrange(len(terms))
    amount = terms[place][0] + random.choice([-10, -2, -1, 1, 2, 10])
    return (*terms[:place], (amount, *terms[place][1:]), *terms[place + 1 :])


def _with(work: _Work, side: str, terms: tuple[tuple, ...]) -> _Work:
    return _Work(terms, work.right) if side == "left" else _Work(work.left, terms)


_DO = {
    "expand left": _expand("left"),
    "expand right": _expand("right"),
    "collect": _collect,
    "move x": _move("x"),
    "move constant": _move(""),
    "divide": _divide,
}
_FAULTS_OF = {
    "expand left": ("arithmetic", "distribution"),
    "expand right": ("arithmetic", "distribution"),
    "collect": ("arithmetic", "sign"),
    "move x": ("arithmetic", "sign", "one side"),
    "move constant": ("arithmetic", "sign", "one side"),
    "divide": ("arithmetic", "one side"),
}
_LAST = ("move x", "move constant", "divide")
_OPERATIONS = {
    2: ("move constant", "divide"),
    3: _LAST,
    4: ("expand left", *_LAST),
    5: ("expand left", "collect", *_LAST),
    6: ("expand left", "expand right", "collect", *_LAST),
}
