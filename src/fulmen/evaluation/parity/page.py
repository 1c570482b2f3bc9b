"""The parity report as one HTML page."""

from html import escape

from fulmen.evaluation.html import html_facts, html_figure, html_page, html_table
from fulmen.evaluation.parity.findings import needle_verdict, short_summary, source_verdict, verdict
from fulmen.evaluation.parity.plots import parity_plots
from fulmen.evaluation.parity.results import ParityResults


def parity_page(report: ParityResults) -> str:
    """The whole page."""
    title = f"Parity of {report.about.get('model', 'a DSA model')} with dense attention"
    sentences = [needle_verdict(report), source_verdict(report)]
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="verdict">{escape(verdict(report))}</p>',
        *(f"<p>{escape(text)}</p>" for text in sentences if text),
        f'<div class="scroll">{html_table(short_summary(report), list(report.variants))}</div>',
        f'<div class="figures">{"".join(html_figure(plot) for plot in parity_plots(report))}</div>',
        f"<footer>{_html_footer(report)}</footer>",
    ]
    return html_page(title, body)


def _html_footer(report: ParityResults) -> str:
    kinds = report.variants["dsa"]["by_kind"].items()
    texts = ", ".join(f"{row['n']} {kind}" for kind, row in kinds)
    facts = {
        "k": f"{report.topk} of {report.length} tokens",
        "texts": f"{texts}; losses in nats per token over the second half of each",
        **report.about,
    }
    return html_facts(facts)
