"""Word problems: someone has so many things, some sentences change that; one calculation for each."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from random import Random

from fulmen.tasks.proofs.arithmetic import linear, plain_signs, worked
from fulmen.tasks.proofs.proof import REASON, RIGHT, SLIP, WRONG, Finding, Proof, Step

NAMES = ("Mia", "Omar", "Lena", "Ravi", "Ana", "Tom", "Yuki", "Sara", "Ivan", "Nora")
THINGS = ("apples", "stamps", "marbles", "cards", "coins", "shells", "pencils", "books")
LARGEST = 999
# In characters, of a stranger's step.
LONGEST_AMOUNT = 20


@dataclass(frozen=True)
class Change:
    """What a sentence does. words: with {name}, {things} and a number {a}, perhaps another one {b}.

    sum: how it is written; wrong: the sum of somebody who takes the wrong operation.
    """

    words: str
    sum: str
    wrong: str

    @property
    def pattern(self) -> re.Pattern[str]:
        """Finds its numbers in a sentence."""
        return re.compile(self.words.format(name=r"\w+", things=r"\w+", a=r"(?P<a>\d+)", b=r"(?P<b>\d+)"))


CHANGES = (
    Change("{name} buys {a} {things}", "{now} + {a}", "{now} - {a}"),
    Change("{name} finds {a} more {things}", "{now} + {a}", "{now} - {a}"),
    Change("{name} gets {a} {things} as a present", "{now} + {a}", "{now} - {a}"),
    Change("{name} loses {a} {things}", "{now} - {a}", "{now} + {a}"),
    Change("{name} gives away {a} {things}", "{now} - {a}", "{now} + {a}"),
    Change("{name} sells {a} {things}", "{now} - {a}", "{now} + {a}"),
    Change("{name} buys {a} boxes of {b} {things} each", "{now} + {a} * {b}", "{now} + {a} + {b}"),
    Change("{name} gives {a} friends {b} {things} each", "{now} - {a} * {b}", "{now} - {a} - {b}"),
    Change("the number of {things} grows to {a} times as many", "{now} * {a}", "{now} + {a}"),
    Change("{name} puts the {things} into {a} equal heaps and keeps one", "{now} / {a}", "{now} - {a}"),
)
_BY_PATTERN = [(change.pattern, change) for change in CHANGES]
_BEGINNING = re.compile(r"\w+ has (\d+) \w+\.")


class Words:
    """`Mia has 24 apples. Mia buys 3 boxes of 12 apples each. ... How many apples are there now?`"""

    name = "words"
    faults: tuple[str, ...] = ("arithmetic", "operation", "number", "stale amount")
    shortest, longest = 2, 8
    form = (
        "There is one step for each sentence that changes the number, in order: that sentence and its "
        "calculation. For example: `Mia buys 3 boxes of 12 apples each: 24 + 3 * 12 = 60`."
    )

    def faults_of(self, n_steps: int) -> tuple[str, ...]:
        """As `ProofKind.faults_of`."""
        return self.faults

    def draw(self, random: Random, n_steps: int, fault: str | None) -> Proof | None:
        """As `ProofKind.draw`."""
        name, things = random.choice(NAMES), random.choice(THINGS)
        at = random.randrange(n_steps) if fault else None
        amounts = [random.randint(10, 60)]
        sentences, steps = [], []
        for place in range(n_steps):
            change = random.choice(CHANGES)
            numbers = _numbers(change, amounts[-1], random)
            sentence = change.words.format(name=name, things=things, **numbers)
            sentences.append(sentence)
            written = _sum(change, amounts, numbers, fault if place == at else None, random)
            result = linear(written).constant if written else Fraction(0)
            if place == at and fault == "arithmetic":
                result += random.choice([-10, -2, -1, 1, 2, 10])
            if result.denominator != 1 or not 0 < result <= LARGEST:
                return None
            amounts.append(int(result))
            reason = _misquoted(sentence, numbers, random) if place == at and fault == REASON else sentence
            steps.append(Step(reason, f"{written} = {amounts[-1]}"))
        problem = ". ".join([f"{name} has {amounts[0]} {things}", *map(_capital, sentences)])
        return Proof(self.name, f"{problem}. How many {things} are there now?", tuple(steps))

    def check(self, problem: str, steps: Sequence[Step]) -> list[Finding]:
        """As `ProofKind.check`."""
        before, *sentences = _sentences(problem)
        amount: Fraction | None = Fraction(before) if before else None
        findings = []
        for place, step in enumerate(steps):
            sentence = sentences[place] if place < len(sentences) else None
            findings.append(_finding(amount, sentence, step))
            amount = _result(step.claim)
        return findings

    def is_finished(self, problem: str, steps: Sequence[Step]) -> bool:
        """As `ProofKind.is_finished`."""
        return len(steps) == len(_sentences(problem)) - 1


def _finding(amount: Fraction | None, sentence: str | None, step: Step) -> Finding:
    change, numbers = _read(sentence) if sentence else (None, {})
    if change is None or sentence is None:
        return Finding(WRONG, "the problem has no such sentence")
    if amount is None or len(str(amount)) > LONGEST_AMOUNT:
        return Finding(WRONG, "the step before ends in no amount that could be")
    calculation = change.sum.format(now=amount, **numbers)
    expected = linear(calculation).constant
    left, _, right = step.claim.partition("=")
    remark = f"{sentence}: {worked(calculation)}; claimed {step.claim}"
    if not (_is_sum(left) and _amount(left) == _amount(right) == expected):
        return Finding(WRONG, remark)
    if _plain(step.reason) != _plain(sentence):
        return Finding(SLIP, f"{remark}, of another sentence")
    return Finding(RIGHT, remark)


def _sentences(problem: str) -> list[str]:
    """The number at the beginning, and the sentences that change it."""
    found = _BEGINNING.match(problem)
    if not found:
        return [""]
    return [found[1], *problem[found.end() :].strip().split(". ")[:-1]]


def _read(sentence: str) -> tuple[Change | None, dict[str, int]]:
    plain = _plain(sentence)
    for pattern, change in _BY_PATTERN:
        if found := re.fullmatch(pattern.pattern, plain, re.IGNORECASE):
            return change, {name: int(number) for name, number in found.groupdict().items()}
    return None, {}


def _plain(sentence: str) -> str:
    return " ".join(sentence.split()).rstrip(".").lower()


def _capital(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]


def _is_sum(text: str) -> bool:
    return bool(re.search(r"\d\s*[-+*/]\s*\d", plain_signs(text)))


def _amount(text: str) -> Fraction | None:
    try:
        value = linear(text)
    except ValueError:
        return None
    return value.constant if value.slope == 0 else None


def _result(claim: str) -> Fraction | None:
    return _amount(claim.rpartition("=")[2])


def _numbers(change: Change, now: int, random: Random) -> dict[str, int]:
    """Numbers for a change of an amount that may be `now`."""
    if "*" in change.sum and "{b}" in change.sum:
        return {"a": random.randint(2, 6), "b": random.randint(2, 12)}
    if "*" in change.sum or "/" in change.sum:
        return {"a": random.randint(2, 4)}
    return {"a": random.randint(2, 40)}


def _sum(
    change: Change, amounts: Sequence[int], numbers: dict[str, int], fault: str | None, random: Random
) -> str | None:
    """What is calculated in a step; None where the fault cannot be there."""
    if fault == "stale amount" and (len(amounts) < 2 or amounts[-2] == amounts[-1]):
        return None
    now = amounts[-2] if fault == "stale amount" else amounts[-1]
    if fault == "number":
        name = random.choice(list(numbers))
        numbers = numbers | {name: _misread(numbers[name], random)}
    return (change.wrong if fault == "operation" else change.sum).format(now=now, **numbers)


def _misread(number: int, random: Random) -> int:
    """Another number that looks like it."""
    others: list[Callable[[int], int]] = [
        lambda n: n + 1,
        lambda n: n - 1,
        lambda n: n + 10,
        lambda n: int(str(n)[::-1]),
    ]
    found = [other(number) for other in others]
    return random.choice([n for n in found if n > 1 and n != number])


def _misquoted(sentence: str, numbers: dict[str, int], random: Random) -> str:
    """A sentence with another number than the problem has."""
    number = numbers[random.choice(list(numbers))]
    return re.sub(rf"\b{number}\b", str(_misread(number, random)), sentence, count=1)
