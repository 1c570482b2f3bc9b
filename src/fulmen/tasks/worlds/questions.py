"""What is asked of a register, each kind harder than the one before; every kind has a solution by the tools.

A solution gets a function that calls a tool, and nothing else: what it finds can be found by an agent. The
answer is worked out apart from it, from the tables.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

from fulmen.tasks.worlds.registry import GOODS, Tables

# A tool's answer, read from its JSON.
ToolCall = Callable[..., Any]


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        text: as it is asked.
        answer: from the tables.
        solve: finds the same by calling tools.
        cargoes: what loading must have led to, by ship; empty where nothing is to be changed.
    """

    text: str
    answer: str
    solve: Callable[[ToolCall], Any]
    cargoes: dict[str, dict[str, int]] = field(default_factory=dict)


def built(draw: Random, tables: Tables) -> Question:
    """One record: find, get."""
    ship = draw.choice(list(tables["ships"].values()))
    return Question(
        f"In which year was the ship {ship['name']} built?",
        str(ship["built"]),
        lambda call: _named(call, "ships", ship["name"])["built"],
    )


def captain_born(draw: Random, tables: Tables) -> Question:
    """From a record to another: find, get, get."""
    ship = draw.choice(list(tables["ships"].values()))
    return Question(
        f"In which year was the captain of the ship {ship['name']} born?",
        str(tables["captains"][ship["captain"]]["born"]),
        lambda call: call("get", id=_named(call, "ships", ship["name"])["captain"])["born"],
    )


def tons_aboard(draw: Random, tables: Tables) -> Question:
    """A sum: find, cargo_of."""
    key, ship = draw.choice(list(tables["ships"].items()))

    def solve(call: ToolCall) -> int:
        found = call("find", table="ships", name=ship["name"])["id"]
        return sum(call("cargo_of", ship=found).values())

    return Question(
        f"How many tons has the ship {ship['name']} loaded in all?",
        str(sum(tables["cargoes"][key].values())),
        solve,
    )


def neighbours(draw: Random, tables: Tables) -> Question:
    """A count: find, get, ships_at."""
    ship = draw.choice(list(tables["ships"].values()))

    def solve(call: ToolCall) -> int:
        home = _named(call, "ships", ship["name"])["home"]
        return len(call("ships_at", port=home)["ships"])

    return Question(
        f"How many ships, itself included, have the same home port as the ship {ship['name']}?",
        str(sum(other["home"] == ship["home"] for other in tables["ships"].values())),
        solve,
    )


def goods_at(draw: Random, tables: Tables) -> Question:
    """A sum over ships: find, ships_at, cargo_of for each."""
    key, goods = _port(draw, tables), draw.choice(GOODS)
    name = tables["ports"][key]["name"]

    def solve(call: ToolCall) -> int:
        port = call("find", table="ports", name=name)["id"]
        ships = call("ships_at", port=port)["ships"]
        return sum(call("cargo_of", ship=ship).get(goods, 0) for ship in ships)

    homes = [ship for ship, record in tables["ships"].items() if record["home"] == key]
    return Question(
        f"How many tons of {goods} have the ships of the home port {name} loaded together?",
        str(sum(tables["cargoes"][ship].get(goods, 0) for ship in homes)),
        solve,
    )


def oldest_captain(draw: Random, tables: Tables) -> Question:
    """A comparison, and on from there: find, ships_at, get for each, get."""
    key = _port(draw, tables)
    name = tables["ports"][key]["name"]
    homes = [record for record in tables["ships"].values() if record["home"] == key]
    oldest = min(homes, key=lambda record: record["built"])
    return Question(
        f"Who is the captain of the oldest ship of the home port {name}?",
        tables["captains"][oldest["captain"]]["name"],
        lambda call: call("get", id=_oldest(call, name)[1]["captain"])["name"],
    )


def load_oldest(draw: Random, tables: Tables) -> Question:
    """A change after a comparison; what it leads to is verified in the tables."""
    key, goods, tons = _port(draw, tables), draw.choice(GOODS), draw.randint(1, 99)
    name = tables["ports"][key]["name"]
    homes = {ship: record for ship, record in tables["ships"].items() if record["home"] == key}
    oldest = min(homes, key=lambda ship: homes[ship]["built"])
    after = dict(tables["cargoes"][oldest])
    after[goods] = after.get(goods, 0) + tons

    def solve(call: ToolCall) -> int:
        return sum(call("load", ship=_oldest(call, name)[0], goods=goods, tons=tons).values())

    return Question(
        f"Load {tons} tons of {goods} onto the oldest ship of the home port {name}. How many tons has it "
        "loaded in all then?",
        str(sum(after.values())),
        solve,
        {oldest: after},
    )


# From level 1 on.
LADDER = (built, captain_born, tons_aboard, neighbours, goods_at, oldest_captain, load_oldest)


def _named(call: ToolCall, table: str, name: str) -> Any:
    return call("get", id=call("find", table=table, name=name)["id"])


def _port(draw: Random, tables: Tables) -> str:
    """A port with a ship."""
    homes: list[str] = sorted({ship["home"] for ship in tables["ships"].values()})
    return draw.choice(homes)


def _oldest(call: ToolCall, name: str) -> tuple[str, Any]:
    """Id and record of a port's oldest ship."""
    port = call("find", table="ports", name=name)["id"]
    ships = [(ship, call("get", id=ship)) for ship in call("ships_at", port=port)["ships"]]
    return min(ships, key=lambda ship: ship[1]["built"])
