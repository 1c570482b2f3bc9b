"""The agents' benchmark: runs of a scripted model counted, kept, resumed; histories under each strategy."""

import json

import pytest
from benchmarks import agents
from typer.testing import CliRunner

from fulmen.errors import ResumeError
from fulmen.tasks.base import HELD_OUT
from fulmen.tasks.worlds.world import make_world
from tests.pipeline.chat_server import ChatServer, call

OPTIONS = ["--tasks", "2", "--budget", "3000", "--only", "none,discard_all", "--at-once", "1"]


def script():
    """The database's question solved without a strategy and answered wrongly with one, then a folder's."""
    world = make_world(HELD_OUT, 1)
    solved = [call(one) for one in (*world.solution, ("answer", {"answer": world.answer}))]
    wrong = call(("answer", {"answer": "nobody knows"}))
    opened = call(("open", {"path": "ships/S1.txt"}))
    return [*solved, wrong, opened, wrong, wrong]


def test_runs_are_counted_kept_and_go_on(tmp_path, monkeypatch):
    # As if every history were long enough for a strategy to act.
    monkeypatch.setattr(agents, "SLACK", 10**6)
    out = tmp_path / "agents.jsonl"
    with ChatServer(script()) as server:
        command = ["run", server.url, str(out), *OPTIONS]
        done = CliRunner().invoke(agents.app, command, catch_exceptions=False)
        asked = [request for request in server.requests if "fulmen_context" in request]
        assert all(request["fulmen_context"]["strategy"] == "discard_all" for request in asked)
        assert len(server.requests) == 7
        again = CliRunner().invoke(agents.app, command, catch_exceptions=False)
        assert len(server.requests) == 7
        other = CliRunner().invoke(agents.app, [*command, "--budget", "4"])
        assert isinstance(other.exception, ResumeError)
    assert done.stdout == again.stdout
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["strategy"], row["kind"], row["solved"], row["steps"]) for row in rows] == [
        ("none", "database", True, 3),
        ("discard_all", "database", False, 1),
        ("none", "documents", False, 2),
        ("discard_all", "documents", False, 1),
    ]
    begins = {row["messages"][0]["content"].split()[0] for row in rows}
    assert len(begins) == 2
    assert rows[0]["hit"] > 0
    summary = json.loads(out.with_suffix(".summary.json").read_text())
    assert [row["strategy"] for row in summary["rows"]] == ["none", "discard_all"]
    assert "| none | 2 | 50 (" in done.stdout


def test_a_run_in_which_a_strategy_has_nothing_to_do_is_not_repeated(tmp_path):
    out, replies = tmp_path / "agents.jsonl", script()
    with ChatServer([*replies[:3], *replies[4:6]]) as server:
        CliRunner().invoke(agents.app, ["run", server.url, str(out), *OPTIONS], catch_exceptions=False)
        assert len(server.requests) == 5
    plain, same, *others = [json.loads(line) for line in out.read_text().splitlines()]
    assert same == {**plain, "strategy": "discard_all", "is_same": True}
    assert [(row["strategy"], row["steps"]) for row in others] == [("none", 2), ("discard_all", 2)]


@pytest.mark.usefixtures("smollm2")
def test_recorded_histories_are_priced_under_each_strategy(tmp_path):
    file = tmp_path / "traces.jsonl"
    CliRunner().invoke(agents.app, ["solutions", str(file), "--tasks", "7"], catch_exceptions=False)
    assert len(file.read_text().splitlines()) == 7
    done = CliRunner().invoke(agents.app, ["replay", str(file), "--budget", "700"], catch_exceptions=False)
    cells = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")][1:]
    counted = {name: (int(over), int(hit.replace(",", ""))) for name, over, hit, *_ in cells}
    # The harder worlds do not fit without a strategy.
    assert counted["none"][0] > 0
    assert counted["discard_all"][0] == 0
    # Nothing hits as much as a history that is only added to.
    assert counted["none"][1] > counted["discard_all"][1] > 0
