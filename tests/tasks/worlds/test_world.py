"""Worlds: solved by their tools alone, the same each time, and scored by what was done, not only said."""

import json

import pytest

from fulmen.errors import ConfigError
from fulmen.tasks.base import HELD_OUT, Score
from fulmen.tasks.worlds.registry import TOOLS, tool_schemas
from fulmen.tasks.worlds.world import LEVELS, make_world

RIGHT, WRONG = Score(1.0, 1.0), Score(0.0, 0.0)


@pytest.mark.parametrize("level", range(1, LEVELS + 1))
def test_calls_of_the_solution_alone_lead_to_the_answer(level):
    for index in (0, 1, HELD_OUT):
        world = make_world(index, level)
        registry = world.start()
        results = [json.loads(registry.call(name, arguments)) for name, arguments in world.solution]
        assert not any("error" in result for result in results)
        assert world.score(world.answer, registry) == RIGHT
        assert world.score(f"It is {world.answer}.", registry) == Score(0.0, 1.0)
        assert world.score(f"{world.answer}1", registry) == WRONG
        again = make_world(index, level)
        assert (again.question, again.answer, again.solution, again.tables) == (
            world.question,
            world.answer,
            world.solution,
            world.tables,
        )
        assert world.messages[1]["content"] == world.question


def test_levels_take_more_and_more_calls_and_indices_differ():
    calls = [sum(len(make_world(index, level).solution) for index in range(20)) for level in (1, 2, 5)]
    assert calls == sorted(calls)
    assert len({make_world(index, 1).question + make_world(index, 1).answer for index in range(20)}) == 20


def test_a_change_must_be_made_and_no_other():
    world = make_world(3, 7)
    assert world.score(world.answer, world.start()) == WRONG
    registry = world.start()
    for name, arguments in world.solution:
        registry.call(name, arguments)
    assert world.score(world.answer, registry) == RIGHT
    registry.call("load", {"ship": "S1", "goods": "tea", "tons": 1})
    assert world.score(world.answer, registry) == WRONG
    looked = make_world(3, 1)
    registry = looked.start()
    registry.call("load", {"ship": "S1", "goods": "tea", "tons": 1})
    assert looked.score(looked.answer, registry) == WRONG


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("sink", {}),
        ("get", {}),
        ("get", {"id": "S99"}),
        ("get", {"id": 7}),
        ("get", {"id": "S1", "more": 1}),
        ("find", {"table": "cargoes", "name": "S1"}),
        ("find", {"table": "ships", "name": "Nobody"}),
        ("ships_at", {"port": "S1"}),
        ("cargo_of", {"ship": "P1"}),
        ("load", {"ship": "S1", "goods": "gold", "tons": 1}),
        ("load", {"ship": "S1", "goods": "tea", "tons": True}),
        ("load", {"ship": "S1", "goods": "tea", "tons": -5}),
    ],
)
def test_a_wrong_call_is_answered_and_changes_nothing(name, arguments):
    world = make_world(0, 1)
    registry = world.start()
    assert "error" in json.loads(registry.call(name, arguments))
    assert registry.tables == world.tables
    assert "error" in json.loads(registry.call(name, "no arguments"))


def test_the_schemas_are_those_of_strict_tools():
    assert {tool["function"]["name"] for tool in tool_schemas()} == TOOLS.keys()
    for tool in tool_schemas():
        parameters = tool["function"]["parameters"]
        assert set(parameters["required"]) == parameters["properties"].keys()
        assert parameters["additionalProperties"] is False


@pytest.mark.parametrize("level", [0, LEVELS + 1, True, "1"])
def test_a_level_that_is_none_is_refused(level):
    with pytest.raises(ConfigError, match="level="):
        make_world(0, level)
