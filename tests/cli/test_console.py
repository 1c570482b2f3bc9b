"""Messages name arguments; the program writes them as its options, and takes options by their old names."""

import ast
import inspect
import os
import re
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import fulmen
from fulmen.cli.console import as_options
from fulmen.cli.main import app
from fulmen.errors import ConfigError
from tests.cli.said import lines_that_stay

COMMANDS = typer.main.get_command(app).commands


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize(
    ("command", "arguments", "message", "shown"),
    [
        (
            "convert",
            ["budget", "steps"],
            "budget and steps exclude each other",
            "--budget and --steps exclude each other",
        ),
        ("convert", ["sparse_steps"], "sparse_steps and steps", "--sparse-steps and steps"),
        ("convert", [], "topk=0 cannot be; budget is meant", "--topk=0 cannot be; budget is meant"),
        ("convert", [], "index_head_dim=7 is odd", "--index-head-dim=7 is odd"),
        (
            "convert",
            ["data"],
            "data='no/data' is no data; the data's",
            "--data='no/data' is no --data; the data's",
        ),
        (
            "convert",
            ["length"],
            "max_length, length-2, /length/length.txt",
            "max_length, length-2, /length/length.txt",
        ),
        ("convert", ["overwrite"], "or pass overwrite", "or pass --overwrite"),
        ("convert", [], "num_attention_heads=4, source=5", "num_attention_heads=4, source=5"),
        (
            "train",
            ["learning_rate"],
            "learning_rate=-1 is a learning_rate",
            "--learning-rate=-1 is a --learning-rate",
        ),
        ("eval", ["kinds"], "kinds is one of many kinds", "--kind is one of many --kind"),
        ("eval", ["json", "html"], "json and html", "--json and --html"),
        ("chat", ["max_new_tokens"], "lower max_new_tokens", "lower --max-new-tokens"),
        ("cost", [], "hit_rate=2 cannot be", "--hit-rate=2 cannot be"),
        ("keys", ["data"], "data=5", "data=5"),
    ],
)
def test_arguments_become_options(command, arguments, message, shown):
    assert as_options(ConfigError(message, arguments=arguments), COMMANDS[command]) == shown


@pytest.mark.parametrize("command", ["convert", "train", "suite"])
def test_options_are_the_functions_arguments(command):
    """Of the same names, so that a message of one is that of the other."""
    function = {"suite": fulmen.evaluate}.get(command) or getattr(fulmen, command)
    arguments = set(inspect.signature(function).parameters) | {"model_dir"}
    shown = {parameter.name for parameter in COMMANDS[command].params if not parameter.hidden}
    assert shown - {"help"} <= arguments


@pytest.mark.parametrize(
    ("command", "old", "new"),
    [("convert", "window", "length"), ("train", "windows", "sequences"), ("eval", "windows", "sequences")],
)
def test_old_names_work_with_a_notice(command, old, new, tmp_path):
    out = () if command == "eval" else ("--out", tmp_path / "out")
    result = call(command, tmp_path, *out, f"--{old}", "0")
    notice, error = lines_that_stay(result.stderr)
    assert notice == f"--{old} is called --{new} now; the old name will go"
    assert error.startswith(f"error: --{new}=0 cannot be")
    both = call(command, tmp_path, *out, f"--{old}", "64", f"--{new}", "64")
    assert both.stderr == f"error: --{old} is the old name of --{new}; give one of them\n"
    assert f"--{old} " not in call(command, "--help").output


def test_an_error_in_the_program_is_that_of_the_function(tmp_path):
    asked = ("convert", tmp_path, "--out", tmp_path / "out", "--budget", "8m", "--steps", "5")
    assert call(*asked).stderr == "error: --budget and --steps exclude each other; give one of them\n"
    with pytest.raises(ConfigError, match=r"^budget and steps exclude each other; give one of them$"):
        fulmen.convert(tmp_path, out=tmp_path / "out", budget="8m", steps=5)


ROOT = Path(fulmen.__file__).parent
SOURCES = {room: sorted((ROOT / room).glob("*.py")) for room in ("cli", "pipeline")}
# Other programs' options: accelerate's, and vLLM's behind `fulmen serve DIR --`.
THEIRS = re.compile("--use_fsdp|--fsdp_version|--config")


def test_no_error_below_the_program_names_an_option():
    for path in sorted(set(ROOT.rglob("*.py")) - set(SOURCES["cli"])):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise):
                parts = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant)]
                words = THEIRS.sub("", " ".join(part for part in parts if isinstance(part, str)))
                assert not re.search("(?<!-)--[a-z]", words), f"{path}:{node.lineno}"


def names_called(tree: ast.AST) -> set[str]:
    return {getattr(node.func, "id", "") for node in ast.walk(tree) if isinstance(node, ast.Call)}


@pytest.mark.parametrize("path", SOURCES["pipeline"], ids=lambda path: path.name)
def test_the_work_prints_nothing_and_draws_nothing(path):
    tree = ast.parse(path.read_text())
    imported = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    assert not {module.partition(".")[0] for module in imported} & {"rich", "typer", "tqdm"}
    assert "print" not in names_called(tree)


def commands_of(command):
    inner = getattr(command, "commands", {}).values()
    return [one for group in inner for one in commands_of(group)] if inner else [command]


def test_the_program_is_options_in_and_tables_out():
    """Its loops are over what it prints; it knows no layer, step or batch."""
    lines = sum(len(path.read_text().splitlines()) for path in SOURCES["cli"])
    assert lines <= 105 * len(list(commands_of(typer.main.get_command(app))))
    for path in SOURCES["cli"]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.For, ast.While)):
                over = ast.unparse(node.iter if isinstance(node, ast.For) else node.test)
                assert not re.search(r"layer|step|batch|epoch", over), f"{path.name}:{node.lineno}"


@pytest.mark.parametrize(("set_before", "seen"), [(None, "1"), ("0", "0")])
def test_large_tensors_come_in_huge_pages_unless_the_user_says_otherwise(set_before, seen, monkeypatch):
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
    if set_before is not None:
        monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", set_before)
    call("usage", "--help")
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == seen
