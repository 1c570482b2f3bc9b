"""Tool use with a verifier: a shop's database that only its tools can read, and questions about it.

A reply is one list of calls, `[{"tool": "price", "arguments": ["tea"]}, …]`, in which "$1" is what the first
call returned. What the last call returns is compared with the answer; nobody knows it who has not called.
"""

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fulmen.errors import ConfigError
from fulmen.tasks.base import Problem, Score
from fulmen.tasks.forms import first_list, in_form, inside_form, without_thinking
from fulmen.tasks.parameters import checked_parameters
from fulmen.tasks.split import problem_at

GOODS = (
    *("apples", "bread", "butter", "candles", "cheese", "coffee", "cups", "eggs", "flour", "forks", "honey"),
    *("jam", "juice", "lamps", "lemons", "milk", "nails", "nuts", "oats", "olives", "onions", "paper"),
    *("pears", "pens", "plates", "rice", "rope", "salt", "soap", "spoons", "sugar", "tea", "towels", "yarn"),
)
SHOPS = (
    "Ahlen",
    "Brig",
    "Calw",
    "Dorum",
    "Elze",
    "Furth",
    "Goch",
    "Husum",
    "Iphofen",
    "Jever",
    "Kehl",
    "Lohr",
)
PROMPT = """A chain of shops has these tools:
price(good): the price of one piece
stock(shop, good): how many pieces a shop has
add(a, b), subtract(a, b), multiply(a, b): arithmetic
Write the calls that answer the question, as one JSON list between <answer> and </answer>. "$1" stands for \
the result of the first call, "$2" for that of the second; the last call gives the answer. Example, for the \
price of two pieces of wax:
<answer>[{{"tool": "price", "arguments": ["wax"]}}, {{"tool": "multiply", "arguments": ["$1", 2]}}]</answer>

Question: {question}"""
_MOST_CALLS = 20
_LARGEST = 10**12

Calls = list[dict[str, Any]]


@dataclass(frozen=True)
class Shops:
    """A database: prices by good, and stock by (shop, good)."""

    prices: Mapping[str, int]
    stock: Mapping[tuple[str, str], int]

    def call(self, tool: str, arguments: list[Any]) -> int:
        """What a tool returns. Raises ValueError, TypeError or KeyError for a call that cannot be."""
        if tool == "price":
            (good,) = arguments
            return self.prices[good]
        if tool == "stock":
            shop, good = arguments
            return self.stock[shop, good]
        a, b = arguments
        if not (type(a) is int and type(b) is int and max(abs(a), abs(b)) < _LARGEST):
            raise ValueError(f"{tool} takes two whole numbers")
        return {"add": a + b, "subtract": a - b, "multiply": a * b}[tool]


class ToolsTask:
    """Questions of one to `max_calls` calls. See the module."""

    def __init__(self, spec: str, parameters: Mapping[str, Any]) -> None:
        """Raises ConfigError for parameters that cannot be."""
        known = checked_parameters(spec, parameters, {"min_calls": 1, "max_calls": 5})
        self.name = spec
        least, most = known.get("min_calls", 1), known.get("max_calls", 5)
        self._kinds = [kind for kind, calls in KINDS if least <= calls <= most]
        if not self._kinds:
            raise ConfigError(f"task {spec!r}: no question has {least} to {most} calls; take 1 to 5")

    def problem(self, index: int) -> Problem:
        """As `Task.problem`."""
        return problem_at(index, self.name, self._numbered)

    def score(self, problem: Problem, reply: str) -> Score:
        """As `Task.score`; leniently the first list of calls that stands anywhere in the reply counts."""
        inside = inside_form(reply)
        strict = float(inside is not None and _answers(problem, inside))
        return Score(strict, max(strict, float(_answers(problem, first_list(without_thinking(reply))))))

    def _numbered(self, number: int) -> Problem:
        draw = random.Random(f"tools {number}")
        question, calls = draw.choice(self._kinds)(draw)
        shops = _shops(draw)
        message = {"role": "user", "content": PROMPT.format(question=question)}
        data = {"shops": shops, "result": _run(shops, calls)}
        return Problem(self.name, number, (message,), in_form(json.dumps(calls)), data)


def _run(shops: Shops, calls: Calls) -> int:
    """What the last call returns. Raises ValueError, TypeError, KeyError or IndexError."""
    results: list[int] = []
    if not isinstance(calls, list) or not 1 <= len(calls) <= _MOST_CALLS:
        raise ValueError("no list of calls")
    for call in calls:
        arguments = [_filled(value, results) for value in call["arguments"]]
        results.append(shops.call(call["tool"], arguments))
    return results[-1]


def _filled(value: Any, results: list[int]) -> Any:
    if isinstance(value, str) and value.startswith("$"):
        place = int(value[1:])
        if not 1 <= place <= len(results):
            raise ValueError(f"{value} is no earlier call")
        return results[place - 1]
    return value


def _answers(problem: Problem, text: str) -> bool:
    """Whether the calls read the database, and come to the right result."""
    try:
        calls = json.loads(text)
        right = _run(problem.data["shops"], calls) == problem.data["result"]
        return right and any(call["tool"] in ("price", "stock") for call in calls)
    except (ValueError, TypeError, KeyError, IndexError, RecursionError):
        return False


def _shops(draw: random.Random) -> Shops:
    stock = {(shop, good): draw.randint(3, 400) for shop in SHOPS for good in GOODS}
    return Shops({good: draw.randint(2, 90) for good in GOODS}, stock)


def _call(tool: str, *arguments: Any) -> dict[str, Any]:
    return {"tool": tool, "arguments": list(arguments)}


def _stock(draw: random.Random) -> tuple[str, Calls]:
    shop, good = draw.choice(SHOPS), draw.choice(GOODS)
    return f"How many pieces of {good} does the shop in {shop} have?", [_call("stock", shop, good)]


def _cost(draw: random.Random) -> tuple[str, Calls]:
    good, pieces = draw.choice(GOODS), draw.randint(2, 40)
    calls = [_call("price", good), _call("multiply", "$1", pieces)]
    return f"What do {pieces} pieces of {good} cost?", calls


def _left(draw: random.Random) -> tuple[str, Calls]:
    shop, good, sold = draw.choice(SHOPS), draw.choice(GOODS), draw.randint(1, 60)
    calls = [_call("stock", shop, good), _call("subtract", "$1", sold)]
    return f"The shop in {shop} sells {sold} pieces of {good}. How many does it have left?", calls


def _together(draw: random.Random) -> tuple[str, Calls]:
    (one, other), good = draw.sample(SHOPS, 2), draw.choice(GOODS)
    calls = [_call("stock", one, good), _call("stock", other, good), _call("add", "$1", "$2")]
    return f"How many pieces of {good} do the shops in {one} and {other} have together?", calls


def _worth(draw: random.Random) -> tuple[str, Calls]:
    shop, good = draw.choice(SHOPS), draw.choice(GOODS)
    calls = [_call("stock", shop, good), _call("price", good), _call("multiply", "$1", "$2")]
    return f"What is all of the {good} in the shop in {shop} worth?", calls


def _basket(draw: random.Random) -> tuple[str, Calls]:
    (one, other), (few, many) = draw.sample(GOODS, 2), (draw.randint(2, 9), draw.randint(2, 30))
    first = [_call("price", one), _call("multiply", "$1", few)]
    second = [_call("price", other), _call("multiply", "$3", many), _call("add", "$2", "$4")]
    return f"What do {few} pieces of {one} and {many} pieces of {other} cost together?", first + second


# Each kind of question, and how many calls it takes.
KINDS: tuple[tuple[Callable[[random.Random], tuple[str, Calls]], int], ...] = (
    *((_stock, 1), (_cost, 2), (_left, 2)),
    *((_together, 3), (_worth, 3), (_basket, 5)),
)
