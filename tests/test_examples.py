"""Every example runs, on a tiny model and few steps; the notebook too, with its plots.

`examples/serve_and_call.py` is run beside the server's tests (tests/serving/test_serve_example.py).
"""

import os
import runpy
import sys
from pathlib import Path

import pytest

import fulmen
from fulmen.pipeline.recipe_settings import read_recipe
from tests.tiny_source import save_tiny_source

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A dense model of random weights with a real tokenizer."""
    return save_tiny_source(tmp_path_factory.mktemp("source") / "tiny")


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs an example with these arguments, as a program is, in this process; gives what it prints."""

    def run_example(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run_example


def test_ops_alone(run):
    printed = run("ops_alone.py", "--length", 256, "--topk", 32)
    by_indexer, by_window = (
        float(line.split()[-1]) for line in printed.splitlines() if line.startswith("error against")
    )
    assert by_indexer < 0.5 * by_window
    assert "error with all keys selected: 0" in printed or "e-0" in printed


def test_convert_in_memory(run, source, tmp_path):
    printed = run("convert_in_memory.py", source, "--out", tmp_path / "made", "--topk", 32, "--files", 20)
    assert f"wrote {tmp_path / 'made'}" in printed
    assert fulmen.load(tmp_path / "made")[0].config.dsa["topk"] == 32


def test_train_on_own_data_and_evaluate(run, source, tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    for file in sorted(Path(os.__file__).parent.glob("*.py"))[:20]:
        (texts / file.name).write_text(file.read_text(encoding="utf-8", errors="replace"), encoding="utf-8")
    small = ("--topk", 32, "--length", 128, "--steps", 2)
    printed = run("train_on_own_data.py", source, "--data", texts, "--out", tmp_path / "out", *small)
    assert f"wrote {tmp_path / 'out/trained'}" in printed
    page = tmp_path / "report.html"
    asked = ("--data", texts, "--html", page, "--lengths", "450", "--samples", 2)
    printed = run("evaluate.py", tmp_path / "out/trained", "--dense", source, *asked)
    assert "niah_single" in printed
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_the_notebook(source, tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.setenv("PYTHONPATH", str(Path(fulmen.__file__).parents[1]))
    notebook = nbformat.read(EXAMPLES / "tour.ipynb", as_version=4)
    (settings,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    small = {
        "SOURCE": str(source),
        "DATA": [os.__file__],
        "OUT": str(tmp_path / "made"),
        "TOPK": 32,
        "LENGTH": 128,
    }
    settings.source = "\n".join(f"{name} = {value!r}" for name, value in small.items())
    nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3


def test_the_recipe_can_be_read():
    """Its stages are run with tiny models in tests/pipeline/test_recipe.py."""
    recipe = read_recipe(EXAMPLES / "recipe-small.yaml")
    assert recipe.base == "smollm2-135m"
    assert [domain.name for domain in recipe.domains] == ["spelling", "sums", "haystack"]


def test_every_example_is_run_by_a_test():
    tests = "".join(
        path.read_text(encoding="utf-8") for path in Path(__file__).parent.rglob("test_*example*.py")
    )
    for example in EXAMPLES.iterdir():
        assert example.name in tests, example
