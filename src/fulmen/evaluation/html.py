"""A report as one HTML page: style, tables and drawings inside, nothing from the network."""

import io
import re
from collections.abc import Mapping, Sequence
from html import escape

from fulmen.evaluation.style import DARK_COLORS, GRID, INK, VARIANT_COLORS, Plot

STYLE = """
:root { color-scheme: light dark; --ink: #1b1c20; --soft: #565963; --grid: #d9dbe1; --paper: #ffffff;
  --card: #f6f7f9; LIGHT }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e9ed; --soft: #a5a8b3; --grid: #3b3e48; --paper: #15161a; --card: #1d1f25; DARK }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.2rem; margin: 0.5rem 0; } h2 { font-size: 1rem; margin: 0 0 0.5rem; }
.verdict { font-size: 1.25rem; line-height: 1.4; margin: 0.5rem 0; max-width: 50rem; }
.scroll { overflow-x: auto; margin: 1.5rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { padding: 0.3rem 0.8rem 0.3rem 0; text-align: left; border-bottom: 1px solid var(--grid); }
th { font-weight: 600; color: var(--soft); } tr.dsa td { font-weight: 600; }
.figures { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
figure { margin: 0; padding: 1rem; background: var(--card); border-radius: 0.5rem; }
figure svg { width: 100%; height: auto; display: block; } figure svg text { font-family: inherit !important; }
figcaption { color: var(--soft); font-size: 0.9rem; margin-top: 0.5rem; }
footer { color: var(--soft); font-size: 0.85rem; margin-top: 2rem; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0 1rem; } dd { margin: 0; }
"""


def html_page(title: str, body: Sequence[str]) -> str:
    """A page in fulmen's style. body: its elements, as HTML."""
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_style()}</style>"
    )
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n'
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def html_table(rows: Sequence[Sequence[str]], names: Sequence[str]) -> str:
    """A table whose first row is the header; `names` are the classes of the others."""
    header, *body = rows
    lines = ["<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in header) + "</tr>"]
    for name, row in zip(names, body, strict=True):
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in row)
        lines.append(f'<tr class="{name}">{cells}</tr>')
    return f"<table>{''.join(lines)}</table>"


def html_figure(plot: Plot) -> str:
    """A drawing with its title and caption."""
    return (
        f'<figure id="{plot.name}"><h2>{escape(plot.title)}</h2>{inline_svg(plot)}'
        f"<figcaption>{escape(plot.caption)}</figcaption></figure>\n"
    )


def html_facts(facts: Mapping[str, str]) -> str:
    """Names and values, for a page's end."""
    return "<dl>" + "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts.items()) + "</dl>"


def inline_svg(plot: Plot) -> str:
    """The drawing as an element of a page, in the page's colours; its ids are unique to it."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": plot.name}):
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        plot.figure.savefig(buffer, format="svg", metadata=no_metadata)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\1{plot.name}-", svg)
    for name, color in VARIANT_COLORS.items():
        svg = svg.replace(color, f"var(--{name})")
    label = f'<svg role="img" aria-label="{escape(plot.caption)}"'
    return svg.replace(INK, "var(--ink)").replace(GRID, "var(--grid)").replace("<svg", label, 1)


def _style() -> str:
    light, dark = (
        " ".join(f"--{name}: {color};" for name, color in colors.items())
        for colors in (VARIANT_COLORS, DARK_COLORS)
    )
    return STYLE.replace("LIGHT", light).replace("DARK", dark)
