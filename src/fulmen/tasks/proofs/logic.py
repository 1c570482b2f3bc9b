"""Propositional deduction: premises A1, A2, ... and steps that cite them and one another."""

import re
from collections.abc import Callable, Sequence
from random import Random

from fulmen.tasks.proofs.formulas import Formula, formula_of, joined, negation
from fulmen.tasks.proofs.proof import REASON, RIGHT, SLIP, WRONG, Finding, Proof, Step
from fulmen.tasks.proofs.rules import OF_ONE, OF_TWO, consequences, follows_in_one_step

_PREMISE = re.compile(r"^(A\d+)\. (.+)$", re.MULTILINE)
_GOAL = re.compile(r"^Show: (.+)$", re.MULTILINE)
_RULES = "|".join([*OF_ONE, *OF_TWO])
_REASON = re.compile(rf"({_RULES}) (?:from|of) (A?\d+)(?: and (A?\d+))?", re.IGNORECASE)
LETTERS = "BCDEFGHJKLMNPQRSTUVW"
# Looking for another rule takes pairs of lines; longer texts are nobody's honest proof of these.
MOST_LINES = 40


class Logic:
    """`A1. P -> Q`, `A2. P`; `Show: Q`."""

    name = "logic"
    faults: tuple[str, ...] = ("converse", "inverse", "negation", "disjunct")
    shortest, longest = 2, 8
    form = (
        "A step is a formula with the rule and the lines that give it; premises are A1, A2, ..., steps their "
        "numbers. Rules: modus ponens (X -> Y and X give Y), modus tollens (X -> Y and not Y give not X), "
        "chain (X -> Y and Y -> Z give X -> Z), elimination (X or Y and not X give Y), conjunction (X and Y "
        "give `X and Y`), simplification (`X and Y` gives X, and Y). "
        "For example: `modus ponens from A2 and 1: not Q`. The last step is what is to be shown."
    )

    def faults_of(self, n_steps: int) -> tuple[str, ...]:
        """As `ProofKind.faults_of`."""
        return self.faults

    def draw(self, random: Random, n_steps: int, fault: str | None) -> Proof | None:
        """As `ProofKind.draw`."""
        drawing = _Drawing(random)
        at = random.randrange(n_steps) if fault else None
        while len(drawing.steps) < n_steps:
            now = fault if len(drawing.steps) == at else None
            if drawing.is_in_chain and now not in (None, REASON, "negation"):
                return None
            drawing.add(n_steps, now)
        return drawing.proof()

    def check(self, problem: str, steps: Sequence[Step]) -> list[Finding]:
        """As `ProofKind.check`."""
        lines = {name: formula_of(text) for name, text in _PREMISE.findall(problem)}
        findings = []
        for number, step in enumerate(steps, 1):
            claim = _formula(step.claim)
            findings.append(_finding(lines, step.reason, claim))
            if claim is not None:
                lines[str(number)] = claim
        return findings

    def is_finished(self, problem: str, steps: Sequence[Step]) -> bool:
        """As `ProofKind.is_finished`."""
        goal = _GOAL.search(problem)
        return goal is not None and _formula(steps[-1].claim) == formula_of(goal[1])


def _finding(lines: dict[str, Formula], reason: str, claim: Formula | None) -> Finding:
    if claim is None or len(lines) > MOST_LINES:
        return Finding(WRONG, "that is no formula which could be read")
    said = _REASON.fullmatch(reason.strip())
    names = [name for name in said.groups()[1:] if name] if said else []
    if said and all(name in lines for name in names):
        cited, rule = [lines[name] for name in names], said[1].lower()
        given = consequences(rule, cited) or []
        gives = claim if claim in given else next(iter(given), "nothing")
        remark = f"{rule} from {_spelled(names, cited)} gives {gives}; claimed {claim}"
        if claim in given:
            return Finding(RIGHT, remark)
    else:
        remark = f"no rule is named with lines that are there; claimed {claim}"
    if follows_in_one_step(claim, list(lines.values())):
        return Finding(SLIP, f"{remark}, which follows otherwise")
    return Finding(WRONG, remark)


def _spelled(names: Sequence[str], cited: Sequence[Formula]) -> str:
    return " and ".join(f"{name} ({formula})" for name, formula in zip(names, cited, strict=True))


def _formula(text: str) -> Formula | None:
    try:
        return formula_of(text)
    except (ValueError, RecursionError):
        return None


# A premise by its place in the list, or a step by its number.
_Line = tuple[str, int]


class _Drawing:
    """A proof that grows by one step at a time, each with the premises that it needs.

    _now: the newest formula, from which the next step goes on; _line: where it stands.
    """

    def __init__(self, random: Random) -> None:
        self._random = random
        self._letters = iter(random.sample(LETTERS, len(LETTERS)))
        self._premises: list[Formula] = []
        self.steps: list[tuple[str, tuple[_Line, ...], Formula]] = []
        self._now = self._literal()
        self._line = self._assume(self._now)
        self._before_chain: tuple[Formula, _Line] | None = None

    def add(self, n_steps: int, fault: str | None) -> None:
        """One more step, of `n_steps`."""
        if self._before_chain is not None:
            self._finish_chain(fault)
        elif fault in (None, REASON):
            self._random.choice([*self._short_moves(), *self._long_moves(n_steps)])()
        elif fault == "negation":
            # Of the moves that the other faults do not have: all come as often as in sound proofs.
            self._random.choice(self._long_moves(n_steps) or self._short_moves())()
            self._negate()
        else:
            self._faulty(str(fault))
        if fault == REASON:
            self._spoil_reason()

    @property
    def is_in_chain(self) -> bool:
        """Whether the next step goes on with the implication that a chain gave."""
        return self._before_chain is not None

    def proof(self) -> Proof | None:
        """The proof, its premises in some order."""
        order = self._random.sample(range(len(self._premises)), len(self._premises))
        names = {("A", place): f"A{number}" for number, place in enumerate(order, 1)}
        names |= {("step", number): str(number) for number in range(1, len(self.steps) + 1)}
        premises = "\n".join(f"{names['A', place]}. {self._premises[place]}" for place in order)
        steps = tuple(
            Step(f"{rule} from {' and '.join(names[line] for line in lines)}", str(claim))
            for rule, lines, claim in self.steps
        )
        return Proof(Logic.name, f"Premises:\n{premises}\nShow: {steps[-1].claim}", steps)

    def _short_moves(self) -> list[Callable[[], None]]:
        return [self._ponens, self._tollens, self._elimination]

    def _long_moves(self, n_steps: int) -> list[Callable[[], None]]:
        """Those that a proof cannot end with."""
        return [self._begin_chain, self._conjunction] if len(self.steps) + 1 < n_steps else []

    def _literal(self) -> Formula:
        letter = Formula(next(self._letters))
        return negation(letter) if self._random.random() < 0.4 else letter

    def _assume(self, formula: Formula) -> _Line:
        self._premises.append(formula)
        return "A", len(self._premises) - 1

    def _claim(self, rule: str, other: _Line, claim: Formula) -> None:
        self.steps.append((rule, (other, self._line), claim))
        self._now, self._line = claim, ("step", len(self.steps))

    def _ponens(self) -> None:
        new = self._literal()
        self._claim("modus ponens", self._assume(joined(self._now, "->", new)), new)

    def _tollens(self) -> None:
        new = self._literal()
        self._claim("modus tollens", self._assume(joined(new, "->", negation(self._now))), negation(new))

    def _elimination(self) -> None:
        new = self._literal()
        self._claim("elimination", self._assume(self._either(negation(self._now), new)), new)

    def _conjunction(self) -> None:
        new = self._literal()
        self._claim("conjunction", self._assume(new), joined(new, "and", self._now))

    def _begin_chain(self) -> None:
        middle, end = self._literal(), self._literal()
        self._before_chain = self._now, self._line
        self._line = self._assume(joined(self._now, "->", middle))
        other = self._assume(joined(middle, "->", end))
        self._claim("chain", other, joined(self._now, "->", end))

    def _finish_chain(self, fault: str | None) -> None:
        """Modus ponens with the implication that a chain gave."""
        assert self._before_chain is not None
        (_, line), self._before_chain = self._before_chain, None
        self._claim("modus ponens", line, self._now.parts[1])
        if fault == "negation":
            self._negate()

    def _faulty(self, fault: str) -> None:
        new = self._literal()
        if fault == "converse":
            self._claim("modus ponens", self._assume(joined(new, "->", self._now)), new)
        elif fault == "inverse":
            premise = joined(negation(self._now), "->", new)
            self._claim("modus tollens", self._assume(premise), negation(new))
        else:
            self._claim("elimination", self._assume(self._either(self._now, new)), negation(new))

    def _negate(self) -> None:
        """Of what the newest step claims the opposite, of two parts that of the second."""
        rule, lines, claim = self.steps[-1]
        if len(claim.parts) == 2:
            self._now = joined(claim.parts[0], claim.sign, negation(claim.parts[1]))
        else:
            self._now = negation(claim)
        self.steps[-1] = rule, lines, self._now

    def _either(self, one: Formula, other: Formula) -> Formula:
        pair = [one, other]
        self._random.shuffle(pair)
        return joined(pair[0], "or", pair[1])

    def _spoil_reason(self) -> None:
        """Another rule, or another line, in the reason of the newest step."""
        rule, lines, claim = self.steps[-1]
        others = [("A", place) for place in range(len(self._premises)) if ("A", place) not in lines]
        if others and self._random.random() < 0.5:
            lines = (self._random.choice(others), lines[1])
        else:
            rule = self._random.choice([one for one in OF_TWO if one != rule])
        self.steps[-1] = rule, lines, claim
