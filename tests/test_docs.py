"""What the documentation says of the repository: links, paths, numbers, the picture and its history."""

import datetime
import json
import re
import runpy
from pathlib import Path

import pytest

import fulmen.ops

ROOT = Path(__file__).parents[1]
HISTORY = ROOT / "benchmarks" / "history"
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "src" / "fulmen" / "ops" / "README.md",
    HISTORY / "README.md",
    *sorted((ROOT / ".github").rglob("*.yml")),
]
# Names in these are those of their day.
RECORDS = {"log.md", "CHANGELOG.md"}
FOLDERS = r"(?:src/fulmen|tests|benchmarks|examples|docs)"


def name_of(page):
    return str(page.relative_to(ROOT))


def prose_of(page):
    """A page without its code blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", prose_of(page)):
        assert target.startswith("https://") or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in RECORDS], ids=name_of)
def test_files_that_are_named_are_there(page):
    for path in re.findall(rf"(?<![\w/]){FOLDERS}/[\w./*<>-]*", page.read_text(encoding="utf-8")):
        if "<" not in path:
            assert any(ROOT.glob(path.rstrip("./"))), path
    for module in re.findall(r"-m (benchmarks[\w.]*)", page.read_text(encoding="utf-8")):
        assert (ROOT / (module.replace(".", "/") + ".py")).exists(), module


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_numbers_below_one_have_their_zero(page):
    assert re.findall(r"(?<![\w.)\]`/])\.\d+", page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(("module", "page"), [(fulmen, "api.md"), (fulmen.ops, "ops.md")])
def test_every_public_name_has_its_place_in_the_reference(module, page):
    told = set(
        re.findall(rf"^::: {module.__name__}\.(\w+)$", (ROOT / "docs" / page).read_text(), re.MULTILINE)
    )
    of_errors = {name for name in module.__all__ if hasattr(fulmen.errors, name)}
    assert set(module.__all__) - of_errors - told <= {
        "BACKENDS",
        "IndexerLoss",
        "SilentReporter",
        "__version__",
    }


def history_lines():
    for file in sorted(HISTORY.glob("*.jsonl")):
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            yield pytest.param(json.loads(line), id=f"{file.stem}:{number}")


@pytest.mark.parametrize("line", history_lines())
def test_every_figure_has_its_date_commit_machine_and_command(line):
    assert set(line) == {"date", "commit", "machine", "command", "what", "settings", "figures"}
    assert datetime.date.fromisoformat(line["date"])
    assert re.fullmatch(r"[0-9a-f]{7,40}", line["commit"])
    assert all(line[key] for key in line)


def test_the_picture_is_that_of_the_history():
    drawing = runpy.run_path(str(ROOT / "benchmarks" / "readme_picture.py"))
    assert (ROOT / "docs" / "readme.svg").read_text(encoding="utf-8") == drawing["picture"]()


def test_the_readme_tells_what_the_picture_shows():
    drawing = runpy.run_path(str(ROOT / "benchmarks" / "readme_picture.py"))
    told = (ROOT / "README.md").read_text(encoding="utf-8")
    results = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    for name, _, right in drawing["lookups"]():
        assert f"{name} {' and '.join(map(str, right.values()))}" in " ".join(told.split())
        assert all(f"| {count}" in results for count in right.values())
    for _, ratio, _ in drawing["speeds"]():
        assert f"{ratio:.2f}" in results
