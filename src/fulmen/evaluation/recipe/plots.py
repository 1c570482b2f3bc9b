"""Drawings of a recipe's run: what each stage's model solves, and the curves of all that was trained."""

from collections.abc import Mapping, Sequence
from typing import Any

from fulmen.evaluation.style import INK, VARIANT_COLORS, VARIANT_MARKERS, Plot, legend_above, new_figure

_KINDS = ("dsa", "window", "oracle", "inherited", "dsa_equal", "one_level", "dense", "random")
Rows = Sequence[Mapping[str, Any]]

# Names, kinds of scores, titles and captions.
SHARES = (
    (
        *("solved", "strict", "Held-out problems solved"),
        "By the likeliest reply of each stage's model, in the form asked for, with 95 % intervals.",
    ),
    (
        *("sampled", "sampled", "Sampled replies that solve held-out problems"),
        "At temperature 1, as reinforcement learning draws them, with 95 % intervals.",
    ),
)
# Fields of the logs of training stages: title and caption.
CURVES = {
    "loss": ("Loss of fine-tuning", "Nats a token of the replies that are learned."),
    "reward": ("Reward", "Mean strict score of a step's replies, which is trained on."),
    "reward_lenient": ("Lenient reward", "Mean score of a step's replies, in whatever form."),
    "length": ("Length", "Mean tokens of a reply."),
    "entropy": ("Entropy", "Of the next token over what sampling kept, in nats."),
    "kl": ("KL to the stage's first model", "Unbiased estimate, in nats a token."),
    "masked_share": ("Masked share", "Replies that left the policy's term, as too far from the policy."),
    "kept_mass": ("Kept mass", "Probability of the tokens that top-p and top-k kept."),
    "engine_trainer_gap": ("Engine and trainer", "Difference of sampled tokens' log-probabilities, in nats."),
}


def recipe_plots(shares: Mapping[str, Mapping[str, Any]], curves: Mapping[str, Rows]) -> list[Plot]:
    """Figures of what is solved by stage, and one for each quantity that some stage logged."""
    plots = [_solved(shares, *drawing) for drawing in SHARES] if shares else []
    return plots + [plot for name in CURVES if (plot := _curve(name, curves)) is not None]


def _solved(shares: Mapping[str, Mapping[str, Any]], name: str, kind: str, title: str, caption: str) -> Plot:
    figure, axes = new_figure(3.4)
    stages = list(shares)
    domains = list(dict.fromkeys(domain for found in shares.values() for domain in found))
    for number, domain in enumerate(domains):
        points = [
            (place, found[domain][kind]) for place, found in enumerate(shares.values()) if domain in found
        ]
        middle = [100 * one["estimate"] for _, one in points]
        below = [100 * (one["estimate"] - one["low"]) for _, one in points]
        above = [100 * (one["high"] - one["estimate"]) for _, one in points]
        shift = 0.12 * (number - (len(domains) - 1) / 2)
        style = _style(number)
        places = [place + shift for place, _ in points]
        axes.errorbar(places, middle, yerr=[below, above], linestyle="none", label=domain, capsize=2, **style)
    axes.set_xticks(range(len(stages)), labels=stages, rotation=30, ha="right")
    axes.set_ylabel("solved, %", color=INK)
    axes.set_ylim(-3, 103)
    legend_above(axes)
    return Plot(name, title, caption, figure)


def _curve(name: str, curves: Mapping[str, Rows]) -> Plot | None:
    # Reinforcement learning logs a loss, too: another quantity.
    known = {
        stage: [row for row in rows if row.get(name) is not None and not (name == "loss" and "reward" in row)]
        for stage, rows in curves.items()
    }
    known = {stage: rows for stage, rows in known.items() if rows}
    if not known:
        return None
    figure, axes = new_figure(2.8)
    for number, (stage, rows) in enumerate(known.items()):
        steps, values = [row["step"] for row in rows], [row[name] for row in rows]
        axes.plot(steps, values, label=stage, markersize=3, linewidth=1.2, **_style(number))
    axes.set_xlabel("step", color=INK)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.margins(x=0.02)
    legend_above(axes)
    title, caption = CURVES[name]
    return Plot(name, title, caption, figure)


def _style(number: int) -> dict[str, Any]:
    kind = _KINDS[number % len(_KINDS)]
    return {"color": VARIANT_COLORS[kind], "marker": VARIANT_MARKERS[kind]}
