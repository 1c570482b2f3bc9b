"""The parity report as one HTML page."""

from html import escape

from fulmen.evaluation.html import html_facts, html_figure, html_page, html_table
from fulmen.evaluation.parity.findings import (
    coarse_verdict,
    lookup_verdict,
    needle_verdict,
    share_of,
    short_summary,
    source_verdict,
    verdict,
)
from fulmen.evaluation.parity.plots import parity_plots
from fulmen.evaluation.parity.results import CoarseTable, LookupTables, ParityResults
from fulmen.evaluation.style import VARIANT_LABELS
from fulmen.evaluation.wording import percent, shares_text


def parity_page(report: ParityResults) -> str:
    """The whole page."""
    title = f"Parity of {report.about.get('model', 'a DSA model')} with dense attention"
    found = (lookup_verdict, needle_verdict, coarse_verdict, source_verdict)
    sentences = [say(report) for say in found]
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="verdict">{escape(verdict(report))}</p>',
        *(f"<p>{escape(text)}</p>" for text in sentences if text),
        f'<div class="scroll">{html_table(short_summary(report), list(report.variants))}</div>',
        _answer_table(report),
        f'<div class="figures">{"".join(html_figure(plot) for plot in parity_plots(report))}</div>',
        _candidate_table(report),
        f"<footer>{_html_footer(report)}</footer>",
    ]
    return html_page(title, body)


def _answer_table(report: ParityResults) -> str:
    if not report.lookups:
        return ""
    names = [row["variant"] for row in report.lookups["rows"]]
    return f'<div class="scroll">{html_table(lookup_rows(report.lookups), names)}</div>'


def _candidate_table(report: ParityResults) -> str:
    if not report.coarse or not report.coarse["layers"]:
        return ""
    rows = candidate_rows(report.coarse)
    return f'<div class="scroll">{html_table(rows, [""] * (len(rows) - 1))}</div>'


def candidate_rows(found: CoarseTable) -> list[tuple[str, ...]]:
    """Attention recall of candidates by layer, beside what is kept of them, the header first."""
    rows = [
        (
            str(row["layer"]),
            *(percent(share) for share in (row["candidates"], row["two_levels"], row["one_level"])),
            percent(row["oracle"]),
        )
        for row in found["layers"]
    ]
    header = ("layer", f"{found['candidates']:,} candidates", "two levels", "one level")
    return [(*header, f"best {found['k']:,}"), *rows]


def lookup_rows(found: LookupTables) -> list[tuple[str, ...]]:
    """Right answers of every variant and k, the header first."""
    rows = [
        (
            VARIANT_LABELS[row["variant"]],
            "all" if row["variant"] == "dense" else f"{row['k']:,} ({share_of(row['k'], found['length'])})",
            f"{row['right']} of {row['n']}",
            shares_text(row["share"]),
            str(row["texts"]),
        )
        for row in found["rows"]
    ]
    return [("variant", "k", "right", "95 % interval", "texts"), *rows]


def _html_footer(report: ParityResults) -> str:
    kinds = report.variants["dsa"]["by_kind"].items()
    texts = ", ".join(f"{row['n']} {kind}" for kind, row in kinds)
    facts = {
        "k": f"{report.topk} of {report.length} tokens",
        "texts": f"{texts}; losses in nats per token over the second half of each",
        **report.about,
    }
    return html_facts(facts)
