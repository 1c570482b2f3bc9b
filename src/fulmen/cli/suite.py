"""`fulmen suite`: suites of tests, of any model: options in, tables out."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from fulmen.cli.device_option import Device
from fulmen.cli.evaluation_options import (
    AnyDir,
    Dense,
    HeldOutData,
    Lengths,
    Model,
    Out,
    Samples,
    Seed,
    Tasks,
    Topk,
    Url,
)
from fulmen.cli.progress import console, reporter
from fulmen.pipeline.api_evaluate import evaluate
from fulmen.pipeline.settings import AUTO_DEVICE
from fulmen.pipeline.suite_settings import ALL, DEFAULT_SAMPLES, SUITES_ALONE, default_folder

if TYPE_CHECKING:
    from fulmen.evaluation.suites.report import SuiteReport


def suite_command(
    model_dir: AnyDir,
    suites: Annotated[
        str,
        typer.Option(metavar="NAMES", help=f"What to measure: {', '.join(SUITES_ALONE)}; some by commas."),
    ] = ALL,
    dense: Dense = None,
    data: HeldOutData = None,
    topk: Topk = None,
    lengths: Lengths = None,
    samples: Samples = DEFAULT_SAMPLES,
    tasks: Tasks = None,
    seed: Seed = 0,
    url: Url = None,
    model: Model = None,
    out: Out = None,
    device: Device = AUTO_DEVICE,
) -> None:
    """Measure any model, converted or not: RULER's tasks, loss on key tokens, short texts, generation.

    An interrupted run goes on when the same command is run again.

    Example: [bold]fulmen suite out/smollm2-dsa --suites ruler,keyloss --lengths 1k,4k --samples 50[/]
    """
    told = reporter()
    folder = out or default_folder(str(model_dir), model)
    report = evaluate(
        model_dir,
        suites=suites,
        dense=dense,
        url=url,
        model=model,
        lengths=lengths,
        samples=samples,
        tasks=tasks or (),
        seed=seed,
        topk=topk,
        data=data or (),
        out=folder,
        device=device,
        reporter=told,
    )
    with told.stage("Write"):
        from fulmen.pipeline.report_files import write_suites

        written = write_suites(report, folder)
    told.note("Wrote " + ", ".join(map(str, written)))
    print_suites(report)


def print_suites(report: "SuiteReport") -> None:
    """Every table, with its notes, on stderr as all of a run."""
    for title, notes, rows in report.sections():
        print_table(rows, title)
        for note in notes:
            console.print(note, highlight=False, markup=False, soft_wrap=True)


def print_table(rows: Sequence[Sequence[str]], title: str | None = None) -> None:
    """A table whose first row is the header."""
    header, *body = rows
    table = Table(*header, title=title)
    for row in body:
        table.add_row(*row)
    console.print(table)
