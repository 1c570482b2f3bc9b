"""Measure a converted model against its dense source, and ask it RULER's questions.

python examples/evaluate.py out/mine/trained --dense smollm2-135m --html report.html
"""

import argparse
from pathlib import Path

import fulmen


def main(
    model: str, dense: str | None, data: list[str], html: Path | None, lengths: str, samples: int
) -> None:
    """Print both reports; write the first one as a page if asked."""
    reporter = fulmen.LineReporter()
    parity = fulmen.evaluate(model, dense=dense, data=data, quick=True, reporter=reporter)
    print(parity.to_markdown())
    if html is not None:
        html.write_text(parity.to_html(), encoding="utf-8")

    suite = fulmen.evaluate(
        model,
        dense=dense,
        data=data,
        suites="ruler",
        tasks=("niah_single", "niah_multikey"),
        lengths=lengths,
        samples=samples,
        reporter=reporter,
    )
    print(suite.to_markdown())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="what fulmen.convert or fulmen.train wrote")
    parser.add_argument("--dense", help="the model it was made from")
    parser.add_argument("--data", nargs="+", default=[], help="held-out text; Python's own by default")
    parser.add_argument("--html", type=Path, help="a page with plots")
    parser.add_argument("--lengths", default="1k,2k", help="tokens of RULER's prompts")
    parser.add_argument("--samples", type=int, default=20, help="questions per task and length")
    main(**vars(parser.parse_args()))
