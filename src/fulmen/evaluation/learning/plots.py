"""Curves of a run of reinforcement learning, one figure a quantity."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fulmen.evaluation.style import INK, VARIANT_COLORS, Plot, legend_above, new_figure

COLORS = [VARIANT_COLORS[name] for name in ("dsa", "window", "oracle", "inherited", "dsa_equal", "one_level")]
# Steps that a smooth line averages over.
SMOOTH = 5


class Curve(NamedTuple):
    """What one figure shows: fields of the log by their label, and words about them."""

    name: str
    title: str
    caption: str
    fields: Mapping[str, str]
    is_log: bool = False


CURVES = (
    Curve(
        "reward",
        "Reward",
        "Mean score of a step's replies: strict, which is trained on, and lenient, in whatever form.",
        {"strict": "reward", "lenient": "reward_lenient"},
    ),
    Curve("length", "Length", "Mean tokens of a reply.", {"tokens": "length"}),
    Curve("entropy", "Entropy", "Of the next token over what sampling kept, in nats.", {"nats": "entropy"}),
    Curve("kl", "KL to the first model", "Unbiased estimate, in nats a token.", {"nats": "kl"}),
    Curve(
        "masked",
        "Masked share",
        "Replies that left the policy's term: worse than their group, and too far from the policy.",
        {"share": "masked_share"},
    ),
    Curve(
        "kept",
        "Kept mass",
        "Probability of the tokens that top-p and top-k kept, which is also what the ratio's mean would be "
        "without the sampling mask; and that mean with it.",
        {"kept mass": "kept_mass", "mean ratio": "ratio"},
    ),
    Curve(
        "gap",
        "Engine and trainer",
        "Difference of the sampled tokens' log-probabilities after each update, in nats.",
        {"mean": "engine_trainer_gap", "largest": "engine_trainer_gap_max"},
        is_log=True,
    ),
    Curve(
        "constant",
        "Groups that teach nothing",
        "Groups whose replies all have the same score, of a step's groups.",
        {"constant": "constant_groups", "all": "groups"},
    ),
)


def learning_plots(rows: Sequence[Mapping[str, Any]]) -> list[Plot]:
    """A figure for each of CURVES, and one of the reward by task where there are several."""
    plots = [_plot(curve, rows) for curve in CURVES]
    names = list(dict.fromkeys(name for row in rows for name in row["by_task"]))
    if len(names) > 1:
        plots.insert(1, _by_task(rows, names))
    return plots


def _plot(curve: Curve, rows: Sequence[Mapping[str, Any]]) -> Plot:
    figure, axes = new_figure(2.8)
    for color, (label, name) in zip(COLORS, curve.fields.items(), strict=False):
        _line(axes, [(row["step"], row[name]) for row in rows], label, color)
    if curve.is_log:
        axes.set_yscale("log")
    _finish(axes, len(curve.fields) > 1)
    return Plot(curve.name, curve.title, curve.caption, figure)


def _by_task(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Plot:
    figure, axes = new_figure(2.8)
    for number, name in enumerate(names):
        points = [(row["step"], row["by_task"].get(name, {}).get("reward")) for row in rows]
        _line(axes, points, name, COLORS[number % len(COLORS)])
    _finish(axes, is_many=True)
    return Plot("tasks", "Reward by task", "Mean strict score of a step's replies to each task.", figure)


def _line(axes: Any, points: Sequence[tuple[int, float | None]], label: str, color: str) -> None:
    """The points, pale, and the mean of the last ones."""
    known = [(step, value) for step, value in points if value is not None]
    steps, values = [step for step, _ in known], [value for _, value in known]
    smooth = [statistics.fmean(values[max(0, n - SMOOTH + 1) : n + 1]) for n in range(len(values))]
    axes.plot(steps, values, color=color, linewidth=0.9, alpha=0.4, marker=".", markersize=3)
    axes.plot(steps, smooth, color=color, linewidth=1.8, label=label)


def _finish(axes: Any, is_many: bool) -> None:
    axes.set_xlabel("step", color=INK)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.margins(x=0.02)
    if is_many:
        legend_above(axes)
