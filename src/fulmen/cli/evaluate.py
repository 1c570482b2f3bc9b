"""`fulmen eval`: options only; the work is in `fulmen.cli.evaluation_run`."""

from pathlib import Path
from typing import Annotated

import typer

from fulmen.cli.settings import DEFAULT_LENGTH, EvalSettings


def evaluate_command(
    model_dir: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", help="A model directory that fulmen convert wrote.", show_default=False
        ),
    ],
    dense: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="A dense model to compare with too. [dim]Default: only DIR itself, read densely.[/]",
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
            help="Texts per kind; more narrow the intervals. [dim]Default: 8, or 2 with --quick.[/]",
            show_default=False,
        ),
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens per text.")] = DEFAULT_LENGTH,
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
) -> None:
    """Compare a converted model with its dense source: loss, retrieval, and controls with the same budget.

    Example: [bold]fulmen eval out/smollm2-dsa --html report.html[/]
    """
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
    from fulmen.cli.evaluation_run import evaluate

    evaluate(settings)
