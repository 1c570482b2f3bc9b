"""`fulmen eval`: parity of a converted model with dense attention: options in, tables out."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fulmen.cli.console import renamed
from fulmen.cli.device_option import Device
from fulmen.cli.evaluation_options import ConvertedDir, Dense, HeldOutData, Topk
from fulmen.cli.progress import STARTING, console, reporter
from fulmen.cli.suite import print_table, suite_command
from fulmen.pipeline.api_evaluate import evaluate
from fulmen.pipeline.report_files import ParityFiles
from fulmen.pipeline.settings import AUTO_DEVICE
from fulmen.pipeline.suite_settings import (
    DEFAULT_SAMPLES,
    PARITY,
    SUITE_NAMES,
    SuiteSettings,
    known_names,
    parse_lengths,
)

if TYPE_CHECKING:
    from fulmen.evaluation.parity.report import ParityReport

# Suites were options of this command before they had one of their own; they go on working.
OLD = typer.Option(hidden=True)


def evaluate_command(
    model_dir: ConvertedDir,
    dense: Dense = None,
    data: HeldOutData = None,
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
    sequences: Annotated[
        int | None,
        typer.Option(
            help="Sequences per kind of text; more narrow the intervals. [dim]Default: 8, or 2 with --quick; "
            "of more than 4096 tokens down to half as many.[/]",
            show_default=False,
        ),
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(
            help="Tokens per sequence. [dim]Default: 4 k, at least 2048, within the context; less if the "
            "text does not fill that.[/]",
            show_default=False,
        ),
    ] = None,
    topk: Topk = None,
    kinds: Annotated[
        list[str] | None,
        typer.Option(
            "--kind",
            help="Kind of text to take, as code, prose or chat; may be repeated. [dim]Default: all.[/]",
            show_default=False,
        ),
    ] = None,
    no_needles: Annotated[
        bool,
        typer.Option("--no-needles", help="Ask no questions that the text answers: loss alone, no verdict."),
    ] = False,
    needle_length: Annotated[
        int | None,
        typer.Option(
            help="Tokens of the prompts of these questions. [dim]Default: 8 k, 2048 to 8192, within the "
            "context; less if the text does not fill that.[/]",
            show_default=False,
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer sequences and questions, for a first look.")
    ] = False,
    device: Device = AUTO_DEVICE,
    windows: Annotated[int | None, OLD] = None,
    suites: Annotated[str, typer.Option("--suite", hidden=True)] = PARITY,
    lengths: Annotated[str | None, OLD] = None,
    samples: Annotated[int, OLD] = DEFAULT_SAMPLES,
    tasks: Annotated[str | None, OLD] = None,
    seed: Annotated[int, OLD] = 0,
    url: Annotated[str | None, OLD] = None,
    model: Annotated[str | None, OLD] = None,
    out: Annotated[Path | None, OLD] = None,
) -> None:
    """Compare a converted model with its dense source: loss, retrieval, and controls with the same budget.

    It asks the model in its chat template, at k and at an 8th and a 16th of the prompt, and counts the
    answers that dense attention gives and DSA does not. A run that is interrupted goes on where it was.

    Suites of tests, as RULER's, have a command of their own: fulmen suite.

    Example: [bold]fulmen eval out/smollm2-dsa --html report.html[/]
    """
    measured = _measured(
        SuiteSettings(
            source=str(model_dir),
            suites=known_names([name.strip() for name in suites.split(",")], "suite", SUITE_NAMES),
            lengths=parse_lengths(lengths),
            samples=samples,
            tasks=tuple(name.strip() for name in tasks.split(",")) if tasks else (),
            url=url,
            model=model,
            dense=dense,
            topk=topk,
        )
    )
    files = ParityFiles(model_dir, json, html, markdown)
    told = reporter()
    if PARITY in measured:
        files.require_writable()
        report = evaluate(
            model_dir,
            dense=dense,
            data=data or (),
            length=length,
            sequences=renamed("windows", windows, "sequences", sequences),
            topk=topk,
            kinds=kinds or (),
            needles=not no_needles,
            needle_length=needle_length,
            quick=quick,
            device=device,
            out=model_dir if os.access(model_dir, os.W_OK) else None,
            reporter=told,
        )
        with told.stage("Write"):
            written = files.write(report)
        told.note("Wrote " + ", ".join(map(str, written)))
        _print(report)
    if others := ",".join(name for name in measured if name != PARITY):
        asked = (others, dense, data, topk, lengths, samples, tasks, seed, url, model, out, device)
        suite_command(model_dir, *asked)


def _measured(settings: SuiteSettings) -> tuple[str, ...]:
    """What is to be measured: parity, and suites."""
    if settings.suites == (PARITY,):
        return settings.suites
    with reporter().stage(STARTING):
        from fulmen.pipeline.suites import suites_of
    return suites_of(settings)


def _print(report: "ParityReport") -> None:
    print_table(report.summary())
    for finding in report.findings():
        console.print(finding, highlight=False, markup=False, soft_wrap=True)
