"""The report's files: whole or absent, complete, and with nothing from the network."""

import json
import re
from dataclasses import FrozenInstanceError, replace
from html.parser import HTMLParser

import pytest

from fulmen.errors import ConfigError
from fulmen.evaluation.parity.measure import measure_parity
from fulmen.evaluation.parity.plots import crossover, parity_plots
from fulmen.evaluation.parity.report import ParityReport
from fulmen.evaluation.provenance import about_run
from fulmen.evaluation.report_files import write_json
from fulmen.evaluation.style import VARIANT_COLORS
from fulmen.evaluation.wording import markdown_table, percent, signed_percent
from tests.evaluation.parity.tiny_parity import TOPK, tiny_dense, tiny_dsa, tiny_needles, tiny_windows

FIGURES = ["position", "sweep", "split", "recall", "needles", "cost"]
COST = [
    {
        "position": p,
        "dense_bytes": 10.0 * p,
        "dsa_bytes": 2000 + 2.0 * p,
        "dense_flops": 3.0 * p,
        "dsa_flops": 4.0 * p,
    }
    for p in (64, 128, 256, 512, 1024)
]


class Page(HTMLParser):
    """What a browser would meet."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.text, self.open = [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def report():
    model = tiny_dsa(tiny_dense())
    measured = measure_parity(model, tiny_windows(), needles=tiny_needles(), ks=[TOPK, 24])
    about = about_run("tiny <model>", ["/usr/bin/fulmen", "parity", "out"])
    return replace(measured, about=about, cost=COST)


@pytest.fixture(scope="module")
def html(report):
    return report.to_html()


def test_json_round_trips(report, tmp_path):
    path = write_json(report.to_dict(), tmp_path / "new" / "parity.json")
    read = json.loads(path.read_text())
    assert read == report.to_dict()
    assert ParityReport.from_dict(read) == report


def test_page_from_json_is_the_same_page(report, html):
    assert ParityReport.from_dict(json.loads(json.dumps(report.to_dict()))).to_html() == html


def test_a_report_of_an_older_version_is_read(report):
    older = {**report.to_dict(), "something": "else"}
    older["mass"] = older.pop("attention_recall")
    del older["about"], older["cost"]
    assert ParityReport.from_dict(older) == replace(report, about={}, cost=[])


def test_what_is_no_report_is_refused_by_name(report):
    values = report.to_dict()
    del values["sweep"], values["needles"]
    with pytest.raises(ConfigError, match="no parity report: sweep, needles missing"):
        ParityReport.from_dict(values)


def test_a_report_is_silent_and_does_not_change(report, capsys):
    before = json.dumps(report.to_dict())
    report.to_dict()["variants"]["dsa"]["kl"] = -1.0
    report.to_markdown()
    assert json.dumps(report.to_dict()) == before
    with pytest.raises(FrozenInstanceError):
        report.topk = 1
    assert capsys.readouterr() == ("", "")


def test_percentages():
    assert (percent(0.0057), percent(0.5, 0), percent(-0.12345, 1)) == ("0.57 %", "50 %", "-12.3 %")
    assert (signed_percent(0.0057), signed_percent(-1.5)) == ("+0.57 %", "-150.00 %")


def test_page_is_well_formed_and_has_every_figure_once(html):
    page = Page(html)
    assert page.open == []
    assert [attributes["id"] for tag, attributes in page.elements if tag == "figure"] == FIGURES
    assert sum(tag == "svg" for tag, _ in page.elements) == len(FIGURES)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_page_loads_nothing_from_outside(html):
    page = Page(html)
    for tag, attributes in page.elements:
        assert tag not in ("link", "script", "iframe", "img", "object", "base")
        for name in ("src", "href", "xlink:href", "data", "poster"):
            assert attributes.get(name, "#").startswith("#"), (tag, attributes)
    assert "@import" not in html
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", html))


def test_references_within_the_page_lead_somewhere(html):
    ids = {attributes.get("id") for _, attributes in Page(html).elements}
    targets = re.findall(r"url\(#([^)]*)\)", html) + re.findall(r'href="#([^"]*)"', html)
    assert targets
    assert set(targets) <= ids


def test_page_follows_the_readers_colours(html):
    assert "prefers-color-scheme: dark" in html
    assert 'name="viewport"' in html
    drawings = "".join(re.findall(r"<svg.*?</svg>", html, re.DOTALL))
    assert all(f"var(--{name})" in drawings for name in ("dense", "oracle", "dsa", "window", "ink", "grid"))
    assert not any(color in drawings for color in VARIANT_COLORS.values())
    # No word is left in the drawing library's own black, which a dark page would swallow.
    words = re.findall(r"<text [^>]*>", drawings)
    assert words
    assert all("fill: var(--ink)" in word or "fill: #ffffff" in word for word in words)


def test_page_says_what_was_found_and_how(report, html):
    text = " ".join(Page(html).text)
    dsa = report.variants["dsa"]
    assert f"with {TOPK} of 80 tokens kept" in text
    assert f"{dsa['second_half']:.4f}" in text
    assert "of 16 questions about 12 texts" in text
    for value in ("tiny <model>", "fulmen parity out", "torch", "transformers", "2 code, 2 prose"):
        assert value in text
    assert "/usr/bin" not in html


def test_every_figure_has_axis_labels_and_a_caption(report):
    plots = parity_plots(report)
    assert [plot.name for plot in plots] == FIGURES
    for plot in plots:
        assert plot.title
        assert plot.caption.endswith(".")
        assert any(axes.get_xlabel() for axes in plot.figure.axes)
        if plot.name != "split":
            assert any(axes.get_ylabel() for axes in plot.figure.axes)


def test_figures_without_data_are_left_out():
    model = tiny_dsa(tiny_dense())
    dense = measure_parity(model, tiny_windows(1), topk=400)
    assert [plot.name for plot in parity_plots(dense)] == ["position", "split"]
    assert "budget k:" not in dense.to_markdown()


def test_markdown_has_the_verdict_and_the_tables(report):
    text = report.to_markdown()
    assert f"with {TOPK} of 80 tokens kept" in text
    for line in (
        "| DSA |",
        "| window + sinks |",
        "| code | 2 |",
        f"| {TOPK} |",
        "| 3 needles | 60 | 2 |",
        "- machine:",
    ):
        assert line in text
    tables = re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE)
    assert len(tables) == 4
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1


def test_markdown_table():
    assert markdown_table([("a", "b"), ("1", "2")]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


def test_crossover_lies_where_the_lines_meet():
    # 10 p = 2000 + 2 p at p = 250; a straight line in log-log between the points next to it.
    assert crossover(COST, "bytes") == pytest.approx(250, rel=0.01)
    assert crossover(COST, "flops") is None
    assert crossover(COST[3:], "bytes") == 512
    assert crossover([], "bytes") is None
