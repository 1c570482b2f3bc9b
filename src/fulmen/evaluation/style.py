"""What all reports look alike by: names, colours and markers of the variants, and their figures."""

from collections.abc import Sequence
from typing import Any, NamedTuple

VARIANT_LABELS = {
    "dense": "dense",
    "key_head_oracle": "oracle per key head",
    "oracle": "oracle (true top-k)",
    "dsa_equal": "DSA, equal k in each layer",
    "dsa": "DSA",
    "one_level": "DSA without the coarse level",
    "candidates": "candidates",
    "inherited": "DSA, inherited only",
    "window": "window + sinks",
    "random": "random keys",
}
INK, GRID = "#1b1c20", "#c9cbd2"
# Okabe and Ito's colours, told apart by colour-blind readers; each variant has its own marker as well.
VARIANT_COLORS = {
    "dense": "#6b6e78",
    "key_head_oracle": "#f0e442",
    "oracle": "#009e73",
    "dsa_equal": "#e69f00",
    "dsa": "#0072b2",
    "one_level": "#56b4e9",
    "candidates": "#5b3a8c",
    "inherited": "#cc79a7",
    "window": "#d55e00",
    "random": "#8c8c8c",
}
VARIANT_MARKERS = {
    "dense": "D",
    "key_head_oracle": "P",
    "oracle": "^",
    "dsa_equal": "h",
    "dsa": "o",
    "one_level": "p",
    "candidates": "<",
    "inherited": "s",
    "window": "v",
    "random": "x",
}
DARK_COLORS = {
    "dense": "#b4b7c2",
    "key_head_oracle": "#f7ef8a",
    "oracle": "#2fcf9f",
    "dsa_equal": "#f5c04d",
    "dsa": "#56b4e9",
    "one_level": "#a6d8f5",
    "candidates": "#b79be8",
    "inherited": "#e8a9cf",
    "window": "#ff9a52",
    "random": "#a8a8a8",
}
# Narrow, so that the letters stay readable on a phone.
WIDTH_INCHES = 5.0


class Plot(NamedTuple):
    """One figure: its file-safe name, title, one-sentence caption, and the Matplotlib figure."""

    name: str
    title: str
    caption: str
    figure: Any


def new_figure(height: float, rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
    """A figure without a window, and its axes: one, or rows of columns."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style: Any = {
        "font.size": 10,
        "axes.grid": True,
        "grid.color": GRID,
        "grid.linewidth": 0.6,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        **dict.fromkeys(
            ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK
        ),
    }
    with rc_context(style):
        figure = Figure(figsize=(WIDTH_INCHES, height), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False)
    figure.patch.set_alpha(0)
    for axes in grid.flat:
        axes.patch.set_alpha(0)
    return figure, grid[0][0] if rows == columns == 1 else grid


def plain_ticks(axis: Any, positions: Sequence[float]) -> None:
    """Ticks at these positions and nowhere else, as short counts."""
    axis.set_ticks(positions, labels=[short_count(position) for position in positions])
    axis.set_ticks([], minor=True)


def short_count(value: float) -> str:
    """ "1M", "32K", "512" or "0.5"."""
    if value >= 2**20:
        return f"{value / 2**20:.0f}M"
    if value >= 10_000:
        return f"{value / 2**10:.0f}K"
    return f"{value:.0f}" if value >= 10 else f"{value:g}"


def legend_above(axes: Any) -> None:
    """A legend outside, above the axes' left corner."""
    # The colour is named here: the style holds for what the axes drew themselves only.
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=2,
        frameon=False,
        fontsize=9,
        borderaxespad=0.2,
        labelcolor=INK,
    )
