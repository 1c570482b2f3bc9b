"""A recipe's report against counts by hand."""

import json

import pytest

from fulmen.evaluation.recipe.plots import recipe_plots
from fulmen.evaluation.recipe.report import RecipeReport

NO, LENIENT, YES = [0.0, 0.0, 0.0], [0.0, 1.0, 0.25], [1.0, 1.0, 0.75]
SOLVED = {
    "base": {"sums": [NO, NO, LENIENT, NO], "words": [NO] * 4},
    "sums/cold": {"sums": [NO, YES, LENIENT, NO]},
    "sums/rl": {"sums": [YES, YES, YES, LENIENT]},
    "distilled": {"sums": [YES, YES, NO, NO], "words": [YES] * 4},
}
CURVES = {
    "sums/cold": [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}],
    "sums/rl": [{"step": 1, "reward": 0.5, "loss": 0.1, "kl": None}],
}


@pytest.fixture
def report():
    samples = {"gcd": {"samples": 8, "kept": 3}}
    return RecipeReport(SOLVED, samples, CURVES, {"sums/rl": "sums/rl/rl.html"}, {"seed": "0"})


def test_shares_and_differences_are_those_counted(report):
    shares = report.shares()
    assert shares["base"]["sums"]["strict"]["estimate"] == 0
    assert shares["base"]["sums"]["lenient"]["estimate"] == 0.25
    assert shares["sums/rl"]["sums"]["strict"]["estimate"] == 0.75
    assert shares["sums/rl"]["sums"]["sampled"]["estimate"] == 0.625
    # Wilson's interval of 3 of 4.
    limits = [shares["sums/rl"]["sums"]["strict"][name] for name in ("low", "high")]
    assert limits == pytest.approx([0.3006, 0.9544], abs=1e-4)
    found = {(one["stage"], one["against"], one["domain"]): one for one in report.differences()}
    assert found.keys() == {("sums/rl", "sums/cold", "sums"), ("distilled", "sums/rl", "sums")}
    assert found["sums/rl", "sums/cold", "sums"]["strict"]["estimate"] == 50
    assert found["distilled", "sums/rl", "sums"]["lenient"]["estimate"] == -50
    # By problem 75, 0, 50 and 25 points more: 37.5, and Student's 3.182 times 32.3 / 2 on either side.
    sampled = found["sums/rl", "sums/cold", "sums"]["sampled"]
    assert list(sampled.values()) == pytest.approx([37.5, -13.9, 88.9], abs=0.1)
    json.dumps(report.to_dict(), allow_nan=False)


def test_a_stage_that_was_not_asked_has_no_share(report):
    header, *rows = report.table()
    kinds = ("strict", "lenient", "sampled")
    assert header == ["stage", *(f"{name}, {kind}" for name in ("sums", "words") for kind in kinds)]
    assert [row[0] for row in rows] == list(SOLVED)
    assert rows[1][4:] == ["-", "-", "-"]
    assert report.verdict().endswith("stage distilled solves: sums 50 %, words 100 %.")
    assert report.sample_table() == [["task", "samples", "kept"], ["gcd", "8", "3"]]


def test_curves_are_of_the_stages_that_have_them(report):
    plots = {plot.name: plot for plot in recipe_plots(report.shares(), report.curves)}
    assert plots.keys() == {"solved", "sampled", "loss", "reward"}
    lines = plots["loss"].figure.axes[0].lines
    assert [line.get_label() for line in lines] == ["sums/cold"]
    assert 'href="sums/rl/rl.html"' in report.to_html()


def test_a_run_that_has_just_begun():
    nothing = RecipeReport({}, {}, {}, {})
    assert "Nothing is measured yet" in nothing.to_html()
    assert "Nothing is measured yet" in nothing.to_markdown()


def test_of_one_problem_nothing_is_sure():
    report = RecipeReport({"base": {"sums": [LENIENT]}, "distilled": {"sums": [YES]}}, {}, {}, {})
    share = report.shares()["base"]["sums"]["sampled"]
    assert list(share.values()) == [0.25, 0, 1]
    assert "25.0 % (0.0 to 100.0 %)" in report.to_markdown()


def test_samples_that_are_all_wrong_are_no_certainty(report):
    share = report.shares()["base"]["words"]["sampled"]
    assert share["estimate"] == share["low"] == 0
    assert share["high"] == report.shares()["base"]["words"]["strict"]["high"] > 0.4
