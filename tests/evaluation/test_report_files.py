"""A report's files: each whole or absent."""

import json

import pytest

from fulmen import OutputError
from fulmen.evaluation.report_files import save_report


class Small:
    """A report."""

    def to_dict(self):
        return {"share": 0.5, "none": None}

    def to_markdown(self):
        return "# Half\n"

    def to_html(self):
        return "<p>½</p>\n"


def files_in(folder):
    return {"json": folder / "r.json", "markdown": folder / "r.md", "html": folder / "r.html"}


def test_every_form_is_in_its_file(tmp_path):
    json_file, markdown, html = save_report(Small(), **files_in(tmp_path / "new"))
    assert json.loads(json_file.read_text()) == {"share": 0.5, "none": None}
    assert (markdown.read_text(), html.read_text(encoding="utf-8")) == ("# Half\n", "<p>½</p>\n")


def test_files_are_replaced_whole(tmp_path):
    paths = files_in(tmp_path)
    for path in paths.values():
        path.write_text("old")
    assert save_report(Small(), **paths) == list(paths.values())
    assert "old" not in [path.read_text() for path in paths.values()]
    assert set(tmp_path.iterdir()) == set(paths.values())


@pytest.mark.parametrize("broken", ["json", "markdown", "html"])
def test_a_place_that_cannot_be_written_is_one_line(broken, tmp_path):
    (tmp_path / "file").write_text("kept")
    (tmp_path / "folder").mkdir()
    others = files_in(tmp_path / "others")
    for place in (tmp_path / "file" / "parity", tmp_path / "folder"):
        with pytest.raises(OutputError, match="cannot be written") as caught:
            save_report(Small(), **{**others, broken: place})
        assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "others") == ["file", "folder"]
