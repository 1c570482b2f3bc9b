"""`fulmen eval`: options only; the work is in `fulmen.pipeline.evaluate`."""

from pathlib import Path
from typing import Annotated

import typer

from fulmen.pipeline.reporter import STARTING, stage
from fulmen.pipeline.settings import EvalSettings
from fulmen.pipeline.suite_settings import (
    DEFAULT_SAMPLES,
    PARITY,
    SUITE_NAMES,
    SuiteSettings,
    parse_lengths,
    parse_names,
)


def evaluate_command(
    model_dir: Annotated[
        Path,
        typer.Argument(
            metavar="DIR",
            help="A model directory that fulmen convert wrote; for suites that need no DSA any model's, "
            "and with --url only the tokenizer is read.",
            show_default=False,
        ),
    ],
    dense: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="The dense model to compare with, after fulmen train above all; in suites it is the one "
            "that answers as dense. [dim]Default: only DIR itself, read densely.[/]",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH",
            help="Held-out text: a file, or a directory of them; may be repeated. "
            "[dim]Default: what comes with Python and was not trained on.[/]",
            show_default=False,
        ),
    ] = None,
    json: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="All figures as JSON. [dim]Default: parity.json in DIR.[/]",
            show_default=False,
        ),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Report with plots. [dim]Default: parity.html in DIR.[/]", show_default=False
        ),
    ] = None,
    markdown: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Report as text. [dim]Default: parity.md in DIR.[/]", show_default=False
        ),
    ] = None,
    windows: Annotated[
        int | None,
        typer.Option(
            help="Texts per kind; more narrow the intervals. [dim]Default: 8, or 2 with --quick; of more "
            "than 4096 tokens down to half as many.[/]",
            show_default=False,
        ),
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(
            help="Tokens per text. [dim]Default: 4 k, at least 2048, within the context; less if the text "
            "does not fill that.[/]",
            show_default=False,
        ),
    ] = None,
    topk: Annotated[
        int | None,
        typer.Option(
            help="Tokens that each query keeps. [dim]Default: the model's own.[/]", show_default=False
        ),
    ] = None,
    kind: Annotated[
        list[str] | None,
        typer.Option(
            help="Kind of text to take, as code, prose or chat; may be repeated. [dim]Default: all.[/]",
            show_default=False,
        ),
    ] = None,
    no_needles: Annotated[bool, typer.Option("--no-needles", help="Leave the retrieval tasks out.")] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer texts and needles, for a first look.")
    ] = False,
    suite: Annotated[
        str, typer.Option(metavar="NAMES", help=f"What to measure: {', '.join(SUITE_NAMES)}; some by commas.")
    ] = PARITY,
    lengths: Annotated[
        str | None,
        typer.Option(
            help="Suites: tokens of a prompt, as 1k,2k,4k, or max. [dim]Default: 1k,2k; with a k above 512: "
            "2 k and 4 k; within the context.[/]",
            show_default=False,
        ),
    ] = None,
    samples: Annotated[
        int, typer.Option(help="Suites: questions per task and length, or texts per length.")
    ] = DEFAULT_SAMPLES,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES", help="Suite ruler: some of its tasks. [dim]Default: all.[/]", show_default=False
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Suites: another seed asks other questions.")] = 0,
    url: Annotated[
        str | None,
        typer.Option(
            help="Suites ruler and generate: ask an OpenAI-compatible endpoint, as http://host:8000/v1.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The endpoint's name for the model.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Suites: folder for results. [dim]Default: suites in DIR, or eval-NAME.[/]",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Compare a converted model with its dense source: loss, retrieval, and controls with the same budget.

    With --suite also RULER's tasks, loss on key tokens, short texts and generation, of any model. An
    interrupted run of suites goes on when the same command is run again.

    Example: [bold]fulmen eval out/smollm2-dsa --html report.html[/]

    Example: [bold]fulmen eval out/smollm2-dsa --suite ruler,keyloss --lengths 1k,4k --samples 50[/]
    """
    chosen = SuiteSettings(
        source=str(model_dir),
        suites=parse_names(suite, "suite", SUITE_NAMES),
        lengths=None if lengths is None else parse_lengths(lengths),
        samples=samples,
        tasks=tuple(name.strip() for name in tasks.split(",")) if tasks else (),
        seed=seed,
        data=tuple(data or ()),
        topk=topk,
        dense=dense,
        url=url,
        model=model,
        out=out,
    )
    settings = EvalSettings(
        model_dir=model_dir,
        dense=dense,
        data=tuple(data or ()),
        json=json,
        html=html,
        markdown=markdown,
        windows=windows,
        length=length,
        topk=topk,
        kinds=tuple(kind or ()),
        needles=not no_needles,
        quick=quick,
    )
    if chosen.suites == (PARITY,):
        with stage(STARTING):
            from fulmen.pipeline.evaluate import evaluate
        evaluate(settings)
        return
    _run_suites(chosen, settings)


def _run_suites(chosen: SuiteSettings, settings: EvalSettings) -> None:
    with stage(STARTING):
        from fulmen.pipeline.evaluate import evaluate
        from fulmen.pipeline.suites import evaluate_suites, suites_of
    names = suites_of(chosen)
    if PARITY in names:
        evaluate(settings)
    evaluate_suites(chosen, tuple(name for name in names if name != PARITY))
