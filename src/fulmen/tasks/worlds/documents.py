"""Questions about several documents that one reply answers; see `fulmen.tasks.base.Task`."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

from fulmen.config import require_positive_int
from fulmen.errors import ConfigError
from fulmen.tasks.base import Problem, Score
from fulmen.tasks.worlds.registry import Record
from fulmen.tasks.worlds.world import make_world

HOW = "Answer from the documents. Write the answer and nothing else: a number, a name or a file's path."
# Levels whose answer needs no tool.
READ_LEVELS = (1, 2, 4, 6)
# A line that is asked for, in letters: long enough to be found, short enough to be written.
SHORTEST_LINE, LONGEST_LINE = 40, 200


class RegisterDocuments:
    """The records of a made-up register, a document each, in any order; questions take one of them or many.

    Args:
        level: of `make_world`, one of READ_LEVELS.
        remarks: sentences in each document that nobody asks for.

    Raises ConfigError for another level.
    """

    def __init__(self, level: int = 2, remarks: int = 2) -> None:
        if level not in READ_LEVELS:
            allowed = ", ".join(map(str, READ_LEVELS))
            raise ConfigError(f"level={level!r} cannot be; use one of {allowed}", arguments=["level"])
        self.name = f"register_{level}"
        self._level, self._remarks = level, remarks

    def problem(self, index: int) -> Problem:
        """The problem of an index."""
        world = make_world(index, self._level, self._remarks)
        texts = self.documents(index)
        return Problem(self.name, index, _messages(texts, world.question), world.answer)

    def documents(self, index: int) -> list[tuple[str, str]]:
        """Path and text of the documents of a problem, in its order."""
        tables = make_world(index, self._level, self._remarks).tables
        texts = [
            (f"{table}/{key}.txt", _sentences(record, tables))
            for table in ("ships", "captains", "ports")
            for key, record in tables[table].items()
        ]
        Random(index).shuffle(texts)
        return texts

    def score(self, problem: Problem, reply: str) -> Score:
        """What a reply is worth."""
        return _score(problem.answer, reply)


class RealDocuments:
    """Real texts: which of them has a line that stands in one alone.

    Args:
        documents: path and text of each, of which a prompt has `at_once`.
        at_once: how many documents a prompt has.

    Raises ConfigError for fewer documents with such a line.
    """

    name = "which_document"

    def __init__(self, documents: Sequence[tuple[str, str]], at_once: int = 4) -> None:
        require_positive_int("at_once", at_once)
        lines = {path: set(map(str.strip, text.split("\n"))) for path, text in documents}
        times = Counter(line for found in lines.values() for line in found)
        self._texts = dict(documents)
        self._own = {
            path: sorted(line for line in found if times[line] == 1 and _can_be_asked(line))
            for path, found in lines.items()
        }
        self._asked = sorted(path for path, own in self._own.items() if own)
        self._at_once = at_once
        if len(self._asked) < at_once:
            raise ConfigError(
                f"documents: {len(self._asked)} have a line of their own, and at_once={at_once}; "
                "give more documents, or ask for fewer",
                arguments=["documents", "at_once"],
            )

    def problem(self, index: int) -> Problem:
        """The problem of an index."""
        draw = Random(index)
        paths = draw.sample(self._asked, self._at_once)
        path = draw.choice(paths)
        line = draw.choice(self._own[path])
        question = f"Which document has this line?\n\n{line}"
        return Problem(
            self.name, index, _messages([(one, self._texts[one]) for one in paths], question), path
        )

    def score(self, problem: Problem, reply: str) -> Score:
        """What a reply is worth."""
        return _score(problem.answer, reply)


def _messages(texts: Sequence[tuple[str, str]], question: str) -> tuple[Mapping[str, Any], ...]:
    documents = "\n\n".join(f"[{path}]\n{text}" for path, text in texts)
    asked = f"{documents}\n\nQuestion: {question}"
    return ({"role": "system", "content": HOW}, {"role": "user", "content": asked})


def _sentences(record: Record, tables: Mapping[str, Mapping[str, Record]]) -> str:
    """A record in words, in which others are called by their names."""
    name, said = record["name"], []
    if "built" in record:
        captain, home = tables["captains"][record["captain"]], tables["ports"][record["home"]]
        said.append(f"The ship {name} was built in {record['built']}.")
        said.append(f"Its captain is {captain['name']}, and its home port is {home['name']}.")
    elif "born" in record:
        said.append(f"The captain {name} was born in {record['born']}.")
    else:
        said.append(f"The port {name} is {record['depth_m']} m deep.")
    return " ".join([*said, record["remarks"]] if "remarks" in record else said)


def _can_be_asked(line: str) -> bool:
    return SHORTEST_LINE <= len(line) <= LONGEST_LINE and any(map(str.isalpha, line))


def _score(answer: str, reply: str) -> Score:
    wanted = answer.casefold()
    strict = reply.strip().strip("[].").casefold() == wanted
    found = re.search(rf"(?<!\w){re.escape(wanted)}(?!\w)", reply.casefold())
    return Score(float(strict), float(found is not None))
