"""`fulmen recipe run` and its parts, as far as they go without work."""

import pytest
from typer.testing import CliRunner

from fulmen.cli.main import app

GOOD = "base: smollm2-135m\ndomains: {a: {tasks: gcd}}\n"


def call(*arguments):
    return CliRunner().invoke(app, [str(one) for one in arguments], env={"COLUMNS": "200"})


def test_it_explains_itself_with_an_example():
    result = call("recipe", "run", "--help")
    assert result.exit_code == 0
    assert "examples/recipe-small.yaml" in result.output
    assert "run" in call("recipe", "--help").output


@pytest.mark.parametrize("command", [("recipe", "run"), ("specialize",), ("distill",)])
@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "cannot be read"),
        ("base: [", "is no YAML"),
        (GOOD.replace("gcd", "gdc"), "did you mean gcd"),
        (GOOD + "mixd: {}\n", "did you mean mixed"),
    ],
)
def test_a_mistake_is_one_line(command, text, words, tmp_path):
    file = tmp_path / "recipe.yaml"
    if text is not None:
        file.write_text(text)
    result = call(*command, file, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert words in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
