"""A register of ships, captains, ports and cargoes, and the tools by which an agent reads and changes it.

A tool answers in JSON. What is wrong with a call is an answer too: a model may write anything.
"""

import json
from collections.abc import Callable, Mapping
from copy import deepcopy
from random import Random
from typing import Any

Record = dict[str, Any]
Tables = dict[str, dict[str, Record]]

_NAMES = (
    "Amsel Brise Dohle Elster Falke Geier Habicht Ibis Kranich Lerche Milan Nebel Otter Pirol Reiher Sperber "
    "Taube Uhu Wachtel Zeisig Anker Boje Dorsch Ebbe Flut Gischt Hering Insel Krabbe Lotse Makrele Norden"
)
_PEOPLE = (
    "Abel Berta Carl Dora Emil Frida Georg Hanna Igor Jule Klara Ludwig Mara Nils Olga Paul Quirin Rosa Sven "
    "Tilda Udo Vera Willi Xaver Yara Zeno"
)
_FAMILIES = "Adler Busch Conrad Decker Ebert Frank Gross Huber Jansen Krause Lorenz Mohr Naumann Ohlsen"
_PORTS = "Altona Bremen Cuxhaven Danzig Emden Flensburg Husum Kiel Leer Memel Norderney Pillau"
GOODS = ("salt", "tea", "timber", "wool", "copper", "grain")
_REMARKS = (
    "Paint renewed in spring.",
    "Two lamps are missing.",
    "The log is kept in two books.",
    "Papers seen and found in order.",
    "Ropes to be changed before winter.",
    "Waits for the tide on most days.",
    "The cook has been there for years.",
    "Insured until the end of the year.",
)
_TABLES = ("ships", "captains", "ports")
# Name, what it is for, the arguments.
TOOLS: dict[str, tuple[str, dict[str, Any]]] = {
    "find": (
        "The id of the ship, captain or port with this name.",
        {"table": {"type": "string", "enum": list(_TABLES)}, "name": {"type": "string"}},
    ),
    "get": ("The record with this id.", {"id": {"type": "string", "maxLength": 8}}),
    "ships_at": (
        "Ids of the ships whose home is this port.",
        {"port": {"type": "string", "maxLength": 8, "description": "The port's id"}},
    ),
    "cargo_of": (
        "What a ship has loaded, in tons.",
        {"ship": {"type": "string", "maxLength": 8, "description": "The ship's id"}},
    ),
    "load": (
        "Load goods onto a ship.",
        {
            "ship": {"type": "string", "maxLength": 8, "description": "The ship's id"},
            "goods": {"type": "string", "enum": list(GOODS)},
            "tons": {"type": "integer", "minimum": 1, "maximum": 999},
        },
    ),
}


def tool_schemas() -> list[dict[str, Any]]:
    """The tools in OpenAI's shape; `answer`, which ends a run, is for the loop to add."""
    schemas = []
    for name, (purpose, arguments) in TOOLS.items():
        parameters: dict[str, Any] = {"type": "object", "properties": arguments}
        parameters |= {"required": list(arguments), "additionalProperties": False}
        function = {"name": name, "description": purpose, "parameters": parameters}
        schemas.append({"type": "function", "function": function})
    return schemas


def make_tables(draw: Random, ships: int, remarks: int) -> Tables:
    """A database of so many ships; `remarks`: sentences in each record that nobody asks for."""

    def remark() -> dict[str, str]:
        return {"remarks": " ".join(draw.choices(_REMARKS, k=remarks))} if remarks else {}

    ports = {
        f"P{number}": {"name": name, "depth_m": draw.randint(4, 40), **remark()}
        for number, name in enumerate(draw.sample(_PORTS.split(), max(2, ships // 4)), 1)
    }
    people = [f"{first} {family}" for first in _PEOPLE.split() for family in _FAMILIES.split()]
    captains = {
        f"C{number}": {"name": name, "born": draw.randint(1900, 1980), **remark()}
        for number, name in enumerate(draw.sample(people, ships), 1)
    }
    names, years = draw.sample(_NAMES.split(), ships), draw.sample(range(1950, 2020), ships)
    masters = draw.sample(list(captains), ships)
    homes = draw.choices(list(ports), k=ships)
    shipped = {
        f"S{number}": {"name": name, "built": built, "captain": captain, "home": home, **remark()}
        for number, (name, built, captain, home) in enumerate(
            zip(names, years, masters, homes, strict=True), 1
        )
    }
    cargoes = {
        ship: {goods: draw.randint(1, 90) for goods in draw.sample(GOODS, draw.randint(1, 3))}
        for ship in shipped
    }
    return {"ships": shipped, "captains": captains, "ports": ports, "cargoes": cargoes}


class Registry:
    """The tools over a copy of a database, which `load` changes."""

    def __init__(self, tables: Tables) -> None:
        self.tables = deepcopy(tables)
        self._tools: dict[str, Callable[..., Any]] = {
            "find": self._find,
            "get": self._get,
            "ships_at": self._ships_at,
            "cargo_of": self._cargo_of,
            "load": self._load,
        }

    def call(self, name: str, arguments: Mapping[str, Any]) -> str:
        """A tool's answer, in JSON; `{"error": ...}` for a tool, argument or id that is none."""
        if name not in self._tools:
            return _error(f"tool {name!r:.40} is none; use {', '.join(TOOLS)}")
        wanted = TOOLS[name][1]
        if not isinstance(arguments, Mapping) or arguments.keys() != wanted.keys():
            return _error(f"{name} takes {', '.join(wanted)}")
        if "tons" in arguments and arguments["tons"] in range(-(10**9), 1):
            return _error("tons must be 1 or more")
        for key, value in arguments.items():
            kind = int if wanted[key]["type"] == "integer" else str
            if type(value) is not kind:
                return _error(f"{key} is no {wanted[key]['type']}")
        try:
            return json.dumps(self._tools[name](**arguments), ensure_ascii=False)
        except KeyError as error:
            return _error(f"{error.args[0]!r:.40} is not there")

    def _find(self, table: str, name: str) -> Any:
        if table not in _TABLES:
            raise KeyError(table)
        found = [key for key, record in self.tables[table].items() if record["name"] == name]
        if not found:
            raise KeyError(name)
        return {"id": found[0]}

    def _get(self, id: str) -> Any:
        for table in _TABLES:
            if id in self.tables[table]:
                return self.tables[table][id]
        raise KeyError(id)

    def _ships_at(self, port: str) -> Any:
        if port not in self.tables["ports"]:
            raise KeyError(port)
        return {"ships": [key for key, ship in self.tables["ships"].items() if ship["home"] == port]}

    def _cargo_of(self, ship: str) -> Any:
        return self.tables["cargoes"][ship]

    def _load(self, ship: str, goods: str, tons: int) -> Any:
        if goods not in GOODS:
            raise KeyError(goods)
        cargo = self.tables["cargoes"][ship]
        cargo[goods] = cargo.get(goods, 0) + tons
        return cargo


def _error(why: str) -> str:
    return json.dumps({"error": why})
