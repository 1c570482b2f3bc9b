"""One question with its database: made from an index and a level, solved and verified when it is made."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

from fulmen.config import require_positive_int
from fulmen.errors import ConfigError
from fulmen.tasks.base import Score
from fulmen.tasks.worlds.questions import LADDER
from fulmen.tasks.worlds.registry import Registry, Tables, make_tables

LEVELS = len(LADDER)
# Ships at level 1, and how many each further level adds; sentences in each record that nobody asks for.
SHIPS, MORE_SHIPS, REMARKS = 6, 3, 4
RULES = (
    "You answer questions about a register of ships by calling its tools, one at a time. Ids look like S1, "
    "C1 or P1; find gives them by name. Call answer when you know: a number or a name, nothing else."
)


@dataclass(frozen=True)
class World:
    """One question and all that belongs to it.

    Attributes:
        index, level: what it was made from.
        question: as it is asked.
        answer: the right one.
        solution: calls that lead to it, as (tool, arguments).
        tables: the database as it is at first.
        cargoes: what the cargoes of some ships must be in the end.
    """

    index: int
    level: int
    question: str
    answer: str
    solution: tuple[tuple[str, Mapping[str, Any]], ...]
    tables: Tables
    cargoes: Mapping[str, Mapping[str, int]]

    @property
    def messages(self) -> list[dict[str, Any]]:
        """Rules and question, in OpenAI's shape."""
        return [{"role": "system", "content": RULES}, {"role": "user", "content": self.question}]

    def start(self) -> Registry:
        """The tools over a fresh copy of the database."""
        return Registry(self.tables)

    def score(self, answer: str, registry: Registry) -> Score:
        """What an answer is worth, after what was done to the registry.

        Nothing at all if the cargoes are not as they should be: neither what was asked for may be missing,
        nor anything else changed.
        """
        if registry.tables["cargoes"] != {**self.tables["cargoes"], **self.cargoes}:
            return Score(0.0, 0.0)
        found = re.search(rf"(?<!\w){re.escape(self.answer.casefold())}(?!\w)", answer.casefold())
        strict = answer.strip().rstrip(".").casefold() == self.answer.casefold()
        return Score(float(strict), float(found is not None))


def make_world(index: int, level: int, remarks: int = REMARKS) -> World:
    """The world of an index at a level, the same each time.

    Args:
        index: from 0; from `fulmen.tasks.base.HELD_OUT` on those that no stage trains on.
        level: 1 to LEVELS.
        remarks: sentences in each record that nobody asks for; more make longer histories.

    Raises ConfigError for a level that is none.
    """
    require_positive_int("level", level)
    if level > LEVELS:
        raise ConfigError(f"level={level} cannot be; use 1 to {LEVELS}", arguments=["level"])
    draw = Random(f"{index} {level} {remarks}")
    tables = make_tables(draw, SHIPS + MORE_SHIPS * (level - 1), remarks)
    question = LADDER[level - 1](draw, tables)
    registry, solution = Registry(tables), []

    def call(tool: str, /, **arguments: Any) -> Any:
        solution.append((tool, arguments))
        return json.loads(registry.call(tool, arguments))

    found = str(question.solve(call))
    world = World(index, level, question.text, question.answer, tuple(solution), tables, question.cargoes)
    assert world.score(found, registry).strict == 1, (world.question, found, world.answer)
    return world
