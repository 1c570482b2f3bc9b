"""Worlds as a task of several turns: `world_steps:level=3`, a call a turn, each with the result of the last.

The same register, questions and verifier as `world`, whose replies are all calls at once.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from fulmen.config import require_positive_int
from fulmen.tasks.base import TURN, Problem, Score
from fulmen.tasks.forms import without_thinking
from fulmen.tasks.parameters import checked_parameters
from fulmen.tasks.split import problem_at
from fulmen.tasks.worlds.registry import TOOLS, Registry
from fulmen.tasks.worlds.world import World, make_world

ANSWER = "answer"
# What the longest solution of the first five levels takes; each turn is a share of a reply's tokens.
TURNS = 12
PROMPT = """A register has ships (name, built, captain, home), captains (name, born) and ports (name, \
depth_m). Its tools:
{tools}
answer(text): ends the work; a number or a name, nothing else
Answer the question by calling tools. Write one call, as JSON and nothing else; you get its result and write \
the next one. Example of a first call, for how deep the port Y is:
{{"tool": "find", "arguments": {{"table": "ports", "name": "Y"}}}}

Question: {question}"""
NO_CALL = json.dumps({"error": 'write one call, as {"tool": "get", "arguments": {"id": "S1"}}'})
Call = tuple[str, Mapping[str, Any]]


class WorldStepsTask:
    """Questions of one level of `fulmen.tasks.worlds`, solved call by call.

    Right is a reply that ends with the answer, after a call that found something, with the cargoes that were
    asked for. What is told is worked out from the reply each time: there is no state between turns.
    """

    def __init__(self, spec: str, parameters: Mapping[str, Any]) -> None:
        """Raises ConfigError for a level that is none, and for no turns."""
        self.name = spec
        known = checked_parameters(spec, parameters, {"level": 1, "turns": TURNS})
        self._level, self.turns = known.get("level", 1), known.get("turns", TURNS)
        require_positive_int("turns", self.turns)
        self._world(0)

    def problem(self, index: int) -> Problem:
        """As `Task.problem`."""
        return problem_at(index, self.name, self._numbered)

    def told(self, problem: Problem, reply: str) -> str | None:
        """As `EpisodeTask.told`: the result of the last turn's call."""
        *_, (call, result) = _played(problem.data["world"].start(), reply)
        return None if call is not None and call[0] == ANSWER else result

    def score(self, problem: Problem, reply: str) -> Score:
        """As `Task.score`; leniently the answer may have words around it."""
        world: World = problem.data["world"]
        registry = world.start()
        done = list(_played(registry, reply))
        call, _ = done[-1]
        if call is None or call[0] != ANSWER or all("error" in json.loads(told) for _, told in done[:-1]):
            return Score(0.0, 0.0)
        return world.score(str(call[1].get("text", "")), registry)

    def _world(self, number: int) -> World:
        return make_world(number, self._level, remarks=0)

    def _numbered(self, number: int) -> Problem:
        world = self._world(number)
        tools = "\n".join(f"{name}({', '.join(takes)}): {does}" for name, (does, takes) in TOOLS.items())
        content = PROMPT.format(tools=tools, question=world.question)
        calls = [*world.solution, (ANSWER, {"text": world.answer})]
        answer = TURN.join(json.dumps({"tool": tool, "arguments": given}) for tool, given in calls)
        return Problem(self.name, number, ({"role": "user", "content": content},), answer, {"world": world})


def _played(registry: Registry, reply: str) -> Iterator[tuple[Call | None, str]]:
    """The call of each turn, None for what is none, with its result; nothing follows an answer."""
    for turn in reply.split(TURN):
        call = _call_in(turn)
        if call is None:
            yield None, NO_CALL
        elif call[0] == ANSWER:
            yield call, "{}"
            return
        else:
            yield call, registry.call(*call)


def _call_in(turn: str) -> Call | None:
    """The call that stands first in a turn."""
    text = without_thinking(turn)
    try:
        found, _ = json.JSONDecoder().raw_decode(text, text.index("{"))
        name, given = found["tool"], found["arguments"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return (name, given) if isinstance(name, str) and isinstance(given, dict) else None
