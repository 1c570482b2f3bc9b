"""The report of a run of reinforcement learning, from rows by hand."""

import pytest

from fulmen.evaluation.learning.plots import CURVES, learning_plots
from fulmen.evaluation.learning.report import learning_report


def row(step, reward, **by_task):
    figures = {name: 0.1 * step for curve in CURVES for name in curve.fields.values()}
    counts = {"constant_groups": 1, "groups": 4, "failed_rewards": step, "engine_trainer_gap": 1e-6 * step}
    tasks = {name: {"reward": value} for name, value in by_task.items()}
    return {**figures, **counts, "step": step, "reward": reward, "by_task": tasks}


ROWS = [row(1, 0.2, spell=0.1, gcd=0.3), row(2, None, spell=None), row(3, 0.6, spell=0.5, gcd=0.7)]
BEFORE = {"spell": [[0.0, 0.5]] * 16, "gcd": [[1.0, 1.0], [0.0, 0.0]]}
AFTER = {"spell": [[1.0, 1.0]] * 12 + [[0.0, 0.5]] * 4, "gcd": [[1.0, 1.0], [0.0, 0.0]]}


def test_scores_before_and_after_with_their_intervals():
    report = learning_report(ROWS, BEFORE, AFTER, {"model": "m"})
    strict, lenient = (report.held_out["spell"][kind] for kind in ("strict", "lenient"))
    assert (strict["before"]["estimate"], strict["after"]["estimate"], strict["n"]) == (0, 0.75, 16)
    assert strict["change"]["estimate"] == 0.75
    assert 0.3 < strict["change"]["low"] < 0.75 < strict["change"]["high"] < 1
    # Scores between 0 and 1: means, paired by problem.
    assert lenient["change"]["estimate"] == pytest.approx(0.375)
    assert lenient["change"]["low"] > 0.2
    assert report.held_out["gcd"]["strict"]["change"]["estimate"] == 0
    assert report.verdict().startswith("On held-out problems, strict score after - before: spell +75.0 (")


def test_what_else_is_said():
    report = learning_report(ROWS, BEFORE, AFTER, {"model": "m"})
    assert "3 of 12 groups had replies of one score" in report.notes()[0]
    assert "3.0e-06 nats a token" in report.notes()[1]
    assert report.notes()[2].startswith("6 replies could not be scored")
    page = report.to_html()
    assert all(f'id="{plot.name}"' in page for plot in learning_plots(ROWS))
    assert "| spell | strict | 16 | 0.0 %" in report.to_markdown()


def test_one_task_has_no_figure_by_task():
    rows = [row(1, 0.2, spell=0.1)]
    assert [plot.name for plot in learning_plots(rows)] == [curve.name for curve in CURVES]
    assert len(learning_plots(ROWS)) == len(CURVES) + 1


def test_without_held_out_problems_there_is_no_table_of_them():
    report = learning_report(ROWS, {}, {}, {"model": "m"})
    assert report.verdict() == "No held-out problems were asked."
    assert "change in points" not in report.to_markdown() + report.to_html()
