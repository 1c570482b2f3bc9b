"""Worlds as a task of post-training: `world:level=3`, in one turn (`fulmen.tasks.worlds.plans`).

An agent sees each result before its next call; here a reply is all of its calls, run when it is scored.
"""

import json
from collections.abc import Mapping
from typing import Any

from fulmen.tasks.base import Problem, Score
from fulmen.tasks.forms import first_list, in_form, inside_form, without_thinking
from fulmen.tasks.parameters import checked_parameters
from fulmen.tasks.split import problem_at
from fulmen.tasks.worlds.plans import Plan, plan_for
from fulmen.tasks.worlds.registry import TOOLS
from fulmen.tasks.worlds.world import World, make_world

PROMPT = """A register has ships (name, built, captain, home), captains (name, born) and ports (name, \
depth_m). Its tools:
{tools}
sum(of), count(of): of a list, or of the values of a record
lowest(of, by): of a list of records the one whose field `by` is lowest
answer(text): ends the work
Write all calls that answer the question, as one JSON list between <answer> and </answer>; nothing is run \
before. "$1.id" stands for the field id of what the first call returns, "$2" for all that the second does; \
of a list, "$2.name" is the list of its items' names. A call that gets a list is made for each of its items. \
Example, for how deep the port Y is:
<answer>[{{"tool": "find", "arguments": {{"table": "ports", "name": "Y"}}}}, \
{{"tool": "get", "arguments": {{"id": "$1.id"}}}}, \
{{"tool": "answer", "arguments": {{"text": "$2.depth_m"}}}}]</answer>

Question: {question}"""


class WorldTask:
    """Questions of one level of `fulmen.tasks.worlds`, solved by a list of calls.

    Right is a reply whose calls lead to the answer and to the cargoes that were asked for; its answer must be
    what a call returned.
    """

    def __init__(self, spec: str, parameters: Mapping[str, Any]) -> None:
        """Raises ConfigError for a level that is none."""
        self.name = spec
        self._level = checked_parameters(spec, parameters, {"level": 1}).get("level", 1)
        self._world(0)

    def problem(self, index: int) -> Problem:
        """As `Task.problem`."""
        return problem_at(index, self.name, self._numbered)

    def score(self, problem: Problem, reply: str) -> Score:
        """As `Task.score`; leniently the first list of calls that stands anywhere in the reply counts."""
        world = problem.data["world"]
        inside = inside_form(reply)
        strict = 0.0 if inside is None else _worth(world, inside)
        return Score(strict, max(strict, _worth(world, first_list(without_thinking(reply)))))

    def _world(self, number: int) -> World:
        # Nobody reads the records whole: remarks would only make them longer.
        return make_world(number, self._level, remarks=0)

    def _numbered(self, number: int) -> Problem:
        world = self._world(number)
        tools = "\n".join(f"{name}({', '.join(takes)}): {does}" for name, (does, takes) in TOOLS.items())
        content = PROMPT.format(tools=tools, question=world.question)
        answer = in_form(json.dumps(plan_for(world)))
        return Problem(self.name, number, ({"role": "user", "content": content},), answer, {"world": world})


def _worth(world: World, text: str) -> float:
    """What a list of calls comes to; 0 for what is none."""
    plan = Plan(world.start())
    try:
        plan.run(json.loads(text))
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return 0.0
    return 0.0 if plan.answer is None else world.score(plan.answer, plan.registry).strict
