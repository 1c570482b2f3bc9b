"""Prices as a figure, a table and files. Matplotlib is imported when the figure is drawn."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from fulmen.evaluation.price.prices import KINDS, PriceRow
from fulmen.evaluation.style import (
    INK,
    VARIANT_COLORS,
    Plot,
    new_figure,
    plain_ticks,
)

ATTENTIONS = ("dense", "dsa")
LABELS = {"dense": "dense attention", "dsa": "DSA"}
STYLES = {"dense": "--", "dsa": "-"}
CSV_FIELDS = ("position", *(f"{kind}_{attention}" for kind in KINDS for attention in ATTENTIONS))
DOTS_PER_INCH = 160


def price_plot(
    rows: Sequence[PriceRow], crossovers: Mapping[str, int | None], measured_to: int | None = None
) -> Plot:
    """Dollars per million tokens against position, prefill above decode, the crossovers marked.

    Args:
        rows: ascending.
        crossovers: of each kind, the position from which DSA is cheaper; None: it is not.
        measured_to: the last position where times were taken; beyond it the plot is shaded. None: no times.
    """
    figure, panels = new_figure(6.0, rows=2, columns=1)
    positions = [row.position for row in rows]
    for (axes,), kind in zip(panels, KINDS, strict=True):
        for attention in ATTENTIONS:
            prices = [getattr(getattr(row, kind), attention) for row in rows]
            style = {"color": VARIANT_COLORS[attention], "linestyle": STYLES[attention]}
            axes.plot(positions, prices, linewidth=1.8, label=LABELS[attention], **style)
        axes.set(xlim=(0, positions[-1]), ylabel="$ per million tokens")
        axes.set_ylim(bottom=0)
        plain_ticks(axes.xaxis, [positions[-1] * step // 4 for step in range(5)])
        _mark_crossover(axes, kind, crossovers[kind], positions[-1])
        if measured_to is not None and measured_to < positions[-1]:
            axes.axvspan(measured_to, positions[-1], color=INK, alpha=0.06, linewidth=0)
    panels[-1][0].set_xlabel("position (tokens)")
    panels[-1][0].legend(frameon=False, labelcolor=INK)
    caption = "What a million tokens cost at a position; dotted: from there on DSA is cheaper."
    if measured_to is not None:
        caption += f" Shaded: beyond the measured {measured_to:,} tokens, along the fitted lines."
    return Plot("price", "Price against position", caption, figure)


def png_bytes(plot: Plot) -> bytes:
    """The drawing as a PNG file on white."""
    buffer = io.BytesIO()
    plot.figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH, facecolor="white")
    return buffer.getvalue()


def price_csv(rows: Sequence[PriceRow]) -> str:
    """One line per position: dollars per million tokens."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_FIELDS)
    writer.writerows((row.position, *row.prefill, *row.decode) for row in rows)
    return text.getvalue()


def price_dict(row: PriceRow) -> dict[str, Any]:
    """A row in plain JSON types."""
    return {"position": row.position, **{kind: getattr(row, kind)._asdict() for kind in KINDS}}


def _mark_crossover(axes: Any, kind: str, position: int | None, length: int) -> None:
    if position is not None:
        axes.axvline(position, color=INK, linewidth=0.8, linestyle=":")
    note = f"never cheaper within {length:,}" if position is None else f"cheaper from {position:,}"
    axes.set_title(f"{kind}: DSA is {note}", loc="left", fontsize=10, color=INK)
