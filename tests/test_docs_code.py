"""Every Python block of the README and the guides runs, page by page, as a reader would type it.

The models that they name are replaced by a tiny one of random weights.
"""

import os
import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from fulmen.cli.main import app
from tests.tiny_source import save_tiny_source

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "docs/python.md", "docs/ops.md", "docs/agents.md", "docs/post-training.md"]
# Of these pages no block is run here: one asks a server (tests/serving), one needs a package that we do not.
ELSEWHERE = ["docs/serving.md", "docs/evaluation.md"]
# Commands of the log are those of their day.
COMMAND_PAGES = [
    *("README.md", "CONTRIBUTING.md", "src/fulmen/ops/README.md"),
    *(f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md")) if page.name != "log.md"),
]
MODELS = ("smollm2-135m", "Qwen/Qwen3-0.6B")
COMMAND = re.compile(r"^(?:\.venv/bin/)?(fulmen .*?)(?:\s{2,}#.*)?$", re.MULTILINE)


def blocks_of(page):
    return re.findall(
        r"^```python\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )


def test_all_pages_with_python_are_known():
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    found = {str(page.relative_to(ROOT)) for page in pages if "```python" in page.read_text(encoding="utf-8")}
    assert found == {*PAGES, *ELSEWHERE}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_tiny_source(tmp_path_factory.mktemp("source") / "tiny")


@pytest.mark.parametrize("page", PAGES)
def test_python_runs(page, source, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    files = sorted(Path(os.__file__).parent.glob("*.py"))[:20]
    names = {"my_texts": [file.read_text(encoding="utf-8", errors="replace") for file in files]}
    for block in blocks_of(page):
        for model in MODELS:
            block = block.replace(model, str(source))
        block = re.sub(r'budget="\w+"|steps=\d+', "steps=1", block)
        exec(compile(block, page, "exec"), names)
    assert names.keys() & {"fulmen", "out", "encode"}


def commands_of(page):
    """`fulmen` and its arguments, in blocks and in running text, over lines that end in a backslash."""
    text = (ROOT / page).read_text(encoding="utf-8").replace("\\\n", " ")
    fenced = "".join(re.findall(r"^```\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    indented = "\n".join(re.findall(r"^ {4}(.*)$", text, re.MULTILINE))
    inline = [re.sub(r"\s+", " ", found) for found in re.findall(r"`(fulmen [^`]*)`", text)]
    for found in [*COMMAND.findall(f"{fenced}\n{indented}"), *inline]:
        if "…" not in found and "..." not in found:
            yield shlex.split(re.split(r"\s[>;|]\s?", found)[0])[1:]


def shown_options(words):
    """What begins with two dashes, before what is handed on to another program."""
    return {word.split("=")[0] for word in words[: [*words, "--"].index("--")] if word.startswith("--")}


@pytest.mark.parametrize("page", COMMAND_PAGES)
def test_commands_have_the_options_that_they_are_shown_with(page):
    for words in commands_of(page):
        command = get_command(app)
        while hasattr(command, "commands") and words and words[0] in command.commands:
            command, words = command.commands[words[0]], words[1:]
        # Hidden ones are names of earlier versions.
        shown = [parameter for parameter in command.params if not getattr(parameter, "hidden", False)]
        known = {option for parameter in shown for option in parameter.opts} | {"--help"}
        assert shown_options(words) <= known, f"{page}: {command.name} has no such option"


@pytest.mark.parametrize("page", COMMAND_PAGES)
def test_benchmarks_have_the_options_that_they_are_shown_with(page):
    text = (ROOT / page).read_text(encoding="utf-8").replace("\\\n", " ")
    for module, arguments in re.findall(r"-m (benchmarks[\w.]+)([^`\n]*)", text):
        source = (ROOT / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8")
        for option in shown_options(shlex.split(arguments, comments=True)):
            name = option.removeprefix("--").replace("-", "_")
            known = re.search(rf"^ +{name}: |[\"']{option}[\"']", source, re.MULTILINE)
            assert known, f"{page}: {module} has no {option}"
