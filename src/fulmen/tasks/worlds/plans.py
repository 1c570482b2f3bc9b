"""A world in one turn: all calls at once, each of which may use what earlier ones return.

`"$2.home"` stands for a field of the second call's result; of a list it stands for that field of each item
that has it. A call that gets a list where a tool takes one value is made for each of its items.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

from fulmen.tasks.worlds.registry import GOODS, TOOLS, Registry
from fulmen.tasks.worlds.world import World

Calls = list[dict[str, Any]]
MOST_CALLS, MOST_LOOKUPS = 20, 200
# What a plan needs besides the registry's tools, since nobody sees a result before the last call.
HELPERS: dict[str, tuple[str, ...]] = {
    "sum": ("of",),
    "count": ("of",),
    "lowest": ("of", "by"),
    "answer": ("text",),
}


class Plan:
    """Runs calls over a registry.

    Attributes:
        answer: what the last `answer` was given, as text; None before.
        lookups: calls of the registry's tools that it did not refuse.
    """

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self.results: list[Any] = []
        self.answer: str | None = None
        self.lookups = 0

    def run(self, calls: Any) -> None:
        """Make the calls. Raises ValueError, TypeError, KeyError or IndexError for what cannot be."""
        if not isinstance(calls, list) or not 1 <= len(calls) <= MOST_CALLS:
            raise ValueError(f"a plan has 1 to {MOST_CALLS} calls")
        for call in calls:
            given = {name: self._filled(value) for name, value in call["arguments"].items()}
            self.results.append(self._made(call["tool"], given))
            if call["tool"] == "answer":
                # What was not looked up is a guess.
                self.answer = str(given["text"]) if str(call["arguments"]["text"]).startswith("$") else None

    def _filled(self, value: Any) -> Any:
        if not (isinstance(value, str) and value.startswith("$")):
            return value
        place, *fields = value[1:].split(".")
        if not 1 <= int(place) <= len(self.results):
            raise ValueError(f"{value} is no earlier call")
        found = self.results[int(place) - 1]
        for name in fields:
            found = [one[name] for one in found if name in one] if isinstance(found, list) else found[name]
        return found

    def _made(self, tool: str, given: Mapping[str, Any]) -> Any:
        if tool in HELPERS:
            return _helped(tool, *(given[name] for name in HELPERS[tool]))
        lists = [name for name, value in given.items() if isinstance(value, list)]
        if not lists:
            return self._looked_up(tool, given)
        (name,) = lists
        return [self._looked_up(tool, {**given, name: one}) for one in given[name]]

    def _looked_up(self, tool: str, given: Mapping[str, Any]) -> Any:
        self.lookups += 1
        if self.lookups > MOST_LOOKUPS:
            raise ValueError(f"more than {MOST_LOOKUPS} look-ups")
        found = json.loads(self.registry.call(tool, given))
        if "error" in found:
            raise ValueError(found["error"])
        return found


def plan_for(world: World) -> Calls:
    """A plan that solves a world, of its level."""
    first = _call("find", **world.solution[0][1])
    return [first, *PLANS[world.level - 1](world)]


def _helped(tool: str, of: Any, by: Any = None) -> Any:
    if tool == "answer":
        return of
    values = list(of.values()) if isinstance(of, dict) else of
    if not isinstance(values, list):
        raise TypeError(f"{tool} takes a list")
    if tool == "count":
        return len(values)
    return sum(values) if tool == "sum" else min(values, key=lambda one: one[by])


def _call(tool: str, **arguments: Any) -> dict[str, Any]:
    return {"tool": tool, "arguments": arguments}


def _built(world: World) -> Calls:
    return [_call("get", id="$1.id"), _call("answer", text="$2.built")]


def _captain_born(world: World) -> Calls:
    return [_call("get", id="$1.id"), _call("get", id="$2.captain"), _call("answer", text="$3.born")]


def _tons_aboard(world: World) -> Calls:
    return [_call("cargo_of", ship="$1.id"), _call("sum", of="$2"), _call("answer", text="$3")]


def _neighbours(world: World) -> Calls:
    look = [_call("get", id="$1.id"), _call("ships_at", port="$2.home")]
    return [*look, _call("count", of="$3.ships"), _call("answer", text="$4")]


def _goods_at(world: World) -> Calls:
    goods = next(one for one in GOODS if f" tons of {one} " in world.question)
    look = [_call("ships_at", port="$1.id"), _call("cargo_of", ship="$2.ships")]
    return [*look, _call("sum", of=f"$3.{goods}"), _call("answer", text="$4")]


def _oldest() -> Calls:
    look = [_call("ships_at", port="$1.id"), _call("get", id="$2.ships")]
    return [*look, _call("lowest", of="$3", by="built")]


def _oldest_captain(world: World) -> Calls:
    return [*_oldest(), _call("get", id="$4.captain"), _call("answer", text="$5.name")]


def _load_oldest(world: World) -> Calls:
    asked = world.solution[-1][1]
    load = _call("load", ship="$5.id", goods=asked["goods"], tons=asked["tons"])
    find = _call("find", table="ships", name="$4.name")
    return [*_oldest(), find, load, _call("sum", of="$6"), _call("answer", text="$7")]


# From level 1 on, as `fulmen.tasks.worlds.questions.LADDER`.
PLANS: tuple[Callable[[World], Calls], ...] = (
    *(_built, _captain_born, _tons_aboard, _neighbours),
    *(_goods_at, _oldest_captain, _load_oldest),
)
assert not HELPERS.keys() & TOOLS.keys()
