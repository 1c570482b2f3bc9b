"""The README's picture, drawn from benchmarks/history: what DSA costs in look-ups, what it gains in decoding.

    .venv/bin/python benchmarks/readme_picture.py        # writes docs/readme.svg

The last line of each kind counts, so that a new measurement is a new line and a new picture. Text stays text
in the file, in the reader's own font, and a dark page gets light ink.
"""

import io
import json
import re
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

matplotlib.use("Agg")

ROOT = Path(__file__).parents[1]
HISTORY = ROOT / "benchmarks" / "history"
PICTURE = ROOT / "docs" / "readme.svg"
LOOKUPS, ASKED = "look-ups among 16 sentences, right of 128", 128
FONTS = "-apple-system, BlinkMacSystemFont, 'Segoe UI', 'Noto Sans', Helvetica, Arial, sans-serif"

PAPER, INK, FAINT, GRID = "#ffffff", "#1f2328", "#59636e", "#d8dee4"
SHORT, LONG, FASTER, SLOWER = "#0969da", "#bc4c00", "#1a7f37", "#9a6700"
# Of a page with a dark background; the colours are GitHub's own.
DARK = {
    PAPER: "#0d1117",
    INK: "#f0f6fc",
    FAINT: "#9198a1",
    GRID: "#30363d",
    SHORT: "#58a6ff",
    LONG: "#f0883e",
    FASTER: "#3fb950",
    SLOWER: "#d29922",
}


def main(out: Annotated[Path, typer.Option(help="The SVG file.")] = PICTURE) -> None:
    """Read the history, draw both panels, write the file."""
    out.write_text(picture(), encoding="utf-8")


def picture() -> str:
    """The SVG's text; the same for the same history."""
    style = {"svg.fonttype": "none", "svg.hashsalt": "fulmen", "font.size": 11, "text.color": INK}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(9.4, 4.1))
        add_card(figure)
        draw_lookups(figure.add_axes((0.167, 0.21, 0.318, 0.57)))
        draw_speed(figure.add_axes((0.548, 0.21, 0.425, 0.57)))
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return adapted(file.getvalue())


def last(file: str, what: str, **settings: Any) -> dict[str, Any]:
    """Figures of the last line of a history file that is of this kind and has these settings."""
    lines = [json.loads(line) for line in (HISTORY / file).read_text(encoding="utf-8").splitlines()]
    fitting = [
        line
        for line in lines
        if line["what"] == what and all(line["settings"].get(key) == value for key, value in settings.items())
    ]
    return fitting[-1]["figures"]


def lookups() -> list[tuple[str, str, dict[str, int]]]:
    """(name, remark, right answers of `ASKED` by the text's tokens)."""
    found = last("quality.jsonl", LOOKUPS)
    remarks = {
        "sliding window": "and 4 sinks",
        "dense": "every token",
        "inherited": "no training at all",
        "trained": "164,000 tokens",
    }
    return [(name, remark, found[name]) for name, remark in remarks.items()]


def speeds() -> list[tuple[int, float, str]]:
    """(tokens in context, times as fast as the best other engine, its name)."""
    found = last("speed.jsonl", "decode, beside every engine")
    best = found["best other engine"]
    return [(int(length), x, best[length]) for length, x in found["DSA over best other engine"].items()]


def draw_lookups(axes: Axes) -> None:
    """Two bars for each kind of attention, one for each length, named where the shortest leave room."""
    title(axes, "What it costs", "Look-ups answered, of 128 · a 16th of the tokens kept", left=-0.43)
    rows = lookups()
    beside = {"transform": axes.get_yaxis_transform(), "ha": "right"}
    for y, (name, remark, right) in zip(range(len(rows))[::-1], rows, strict=True):
        axes.text(-0.05, y + 0.02, name, va="bottom", weight="bold", **beside)
        axes.text(-0.05, y - 0.06, remark, va="top", color=FAINT, size=9.5, **beside)
        for length, colour, above in (("4096", SHORT, 0.2), ("8192", LONG, -0.2)):
            axes.barh(y + above, right[length], height=0.32, color=colour)
            said = {"va": "center", "color": colour, "size": 11, "weight": "bold"}
            axes.text(right[length] + 3, y + above - 0.02, str(right[length]), **said)
            if y == len(rows) - 1:
                axes.text(22, y + above - 0.02, f"of {int(length):,} tokens", **{**said, "weight": "normal"})
    axes.set(xlim=(0, ASKED), ylim=(-0.65, len(rows) - 0.35), yticks=[])
    axes.set_xticks([0, 32, 64, 96, 128])
    bare(axes)


def draw_speed(axes: Axes) -> None:
    """One line over the context's length, with the best other engine as 1."""
    title(axes, "What it gains", "Decode speed against the best dense engine", left=0)
    points = speeds()
    lengths, ratios = [length for length, *_ in points], [ratio for _, ratio, _ in points]
    axes.axhline(1, color=FAINT, linewidth=1.2, linestyle=(0, (4, 3)))
    axes.text(lengths[-1] * 1.7, 0.94, "best dense engine = 1", ha="right", va="top", color=FAINT, size=9.5)
    axes.plot(lengths, ratios, color=FASTER, linewidth=2, zorder=2)
    below = {"textcoords": "offset points", "ha": "center", "va": "top", "color": FAINT, "size": 9.5}
    for length, ratio, best in points:
        faster = ratio >= 1
        axes.annotate(best.replace(", ", "\n"), (length, 0), xytext=(0, -24), **below)
        axes.plot(length, ratio, "o", color=FASTER if faster else SLOWER, markersize=10, zorder=3)
        label(axes, f"{ratio:.2f}×", (length, ratio), FASTER if faster else SLOWER, faster)
    axes.set(xscale="log", xlim=(lengths[0] / 1.8, lengths[-1] * 1.8), ylim=(0, 2.8), yticks=[])
    names = [f"{length // 1024}K" if length >= 1024 else str(length) for length in lengths]
    axes.set_xticks(lengths, [f"{names[0]} tokens", *names[1:]])
    bare(axes)


def label(axes: Axes, text: str, point: tuple[float, float], colour: str, above: bool) -> None:
    """A figure in its dot's colour, above or below it."""
    at = {"xytext": (-3, 9) if above else (0, -9), "textcoords": "offset points", "ha": "center"}
    place = {"va": "bottom" if above else "top", "color": colour, "size": 11.5, "weight": "bold"}
    axes.annotate(text, point, **at, **place)


def title(axes: Axes, head: str, remark: str, left: float) -> None:
    """Two lines over a panel, from `left` in widths of the panel."""
    at = {"transform": axes.transAxes, "ha": "left", "va": "bottom"}
    axes.text(left, 1.17, head, size=15, weight="bold", **at)
    axes.text(left, 1.07, remark, size=10.5, color=FAINT, **at)


def bare(axes: Axes) -> None:
    """No frame but the line of the horizontal axis."""
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.tick_params(axis="x", which="both", length=0, labelcolor=INK, labelsize=10.5, pad=6)
    axes.minorticks_off()
    axes.patch.set_visible(False)


def add_card(figure: Figure) -> None:
    """The paper under both panels, so that the ink is legible whatever page the picture stands on."""
    box = FancyBboxPatch((0.004, 0.01), 0.992, 0.98, boxstyle="round,pad=0,rounding_size=0.012")
    box.set(transform=figure.transFigure, facecolor=PAPER, edgecolor=GRID, linewidth=1, zorder=-1)
    figure.add_artist(box)


def adapted(svg: str) -> str:
    """The drawing with its own font and, on dark pages, with other colours."""
    dark = "".join(
        f'[style*="{part}: {light}"]{{{part}:{other} !important}}'
        for light, other in DARK.items()
        for part in ("fill", "stroke")
    )
    font = f"text{{font-family:{FONTS} !important}}"
    sheet = f"<style>{font}@media (prefers-color-scheme:dark){{{dark}}}</style>"
    said = "; ".join(f"{name} {' and '.join(map(str, right.values()))}" for name, _, right in lookups())
    svg = re.sub(r" *<metadata>.*?</metadata>\n", "", svg, flags=re.DOTALL)
    head = f"<title>Look-ups of {ASKED} at 4,096 and 8,192 tokens: {said}</title>\n {sheet}"
    svg = re.sub(r"(<svg [^>]*>)", rf"\1\n {head}", svg, count=1)
    return "\n".join(line.rstrip() for line in svg.splitlines()) + "\n"


if __name__ == "__main__":
    typer.run(main)
