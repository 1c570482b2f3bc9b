"""BFCL's benchmark: a scripted model's calls, judged by the package's own checker where it is installed."""

import json

import pytest
import typer
from benchmarks import bfcl
from typer.testing import CliRunner

from tests.pipeline.chat_server import ChatServer, call, fail, say

app = typer.Typer()
app.command()(bfcl.main)


@pytest.fixture
def cases():
    pytest.importorskip("bfcl_eval", reason="not installed: pip install --no-deps bfcl-eval")
    return bfcl.load_cases()


def right_call(case):
    """A right call: of each argument the first value that is accepted and is not empty."""
    ((name, accepted),) = case["answer"][0].items()
    return name, chosen(accepted)


def chosen(accepted):
    """Of each member the first accepted value, which may be an object or a list of some."""
    if isinstance(accepted, list):
        return [chosen(one) for one in accepted]
    if not isinstance(accepted, dict):
        return accepted
    full = {key: [value for value in values if value != ""] for key, values in accepted.items()}
    return {key: chosen(values[0]) for key, values in full.items() if values}


def test_types_are_those_of_json_schema():
    described = {
        "type": "dict",
        "properties": {
            "size": {"type": "float", "optional": True, "default": 1.5},
            "pairs": {"type": "array", "items": {"type": "tuple", "items": {"type": "any"}}},
        },
        "required": ["size"],
    }
    assert bfcl.schema_of(described) == {
        "type": "object",
        "properties": {
            "size": {"type": "number", "default": 1.5},
            "pairs": {"type": "array", "items": {"type": "array", "items": {"type": "string"}}},
        },
        "required": ["size"],
    }


def test_the_packages_own_answers_are_right_and_others_are_not(cases):
    check = bfcl.checker()
    assert len(cases) == 400
    wrong = [case["id"] for case in cases if not judged(check, case, right_call(case))]
    assert wrong == []
    case = cases[0]
    name, arguments = right_call(case)
    for other in (
        ("f", arguments),
        (name, {}),
        (name, arguments | {"base": 11}),
        (name, arguments | {"x": 1}),
    ):
        assert not judged(check, case, other)
    assert not bfcl.judged(check, case, [])
    assert not bfcl.judged(check, case, [[name, "{'base'"]])
    assert not bfcl.judged(check, case, [[name, "[1]"]])


def judged(check, case, made):
    return bfcl.judged(check, case, [[made[0], json.dumps(made[1])]])


def test_a_run_is_counted_kept_and_goes_on(cases, tmp_path):
    out = tmp_path / "bfcl.jsonl"
    script = [call(right_call(cases[0])), say("I would rather not."), fail(422, "no such schema")]
    with ChatServer([*script, call(right_call(cases[3]))]) as server:
        options = [server.url, str(out), "--at-once", "1", "--cases"]
        CliRunner().invoke(app, [*options, "3"], catch_exceptions=False)
        done = CliRunner().invoke(app, [*options, "4"], catch_exceptions=False)
        assert [request["tool_choice"] for request in server.requests] == ["required"] * 4
        assert server.requests[0]["tools"][0]["function"]["parameters"]["type"] == "object"
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["right"] for row in rows] == [True, False, False, True]
    assert "no such schema" in rows[2]["refused"]
    assert "| tiny | required | 4 | 50.0 (" in done.stdout


def test_models_are_compared_on_the_cases_that_both_have():
    used = {"choice": "required", "hit": 0, "missed": 10, "written": 5}
    rows = [
        {"model": model, "case": case, "right": right, **used}
        for model, right, cases in (("dense", True, "ab"), ("dsa", False, "abc"))
        for case in cases
    ]
    dense, dsa = bfcl.table(rows).splitlines()[2:]
    assert dense.startswith("| dense | required | 2 | 100.0 (")
    assert "| – |" in dense
    assert "| -100.0 (" in dsa
