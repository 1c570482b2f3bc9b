"""`fulmen inspect`: what a model is and what DSA would save it, without loading weights."""

import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from fulmen.cli.progress import reporter

if TYPE_CHECKING:
    from fulmen.pipeline.description import ModelDescription


def inspect_command(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A model, dense or converted: a directory, a Hugging Face name, a .gguf file, smollm2-135m.",
            show_default=False,
        ),
    ],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print everything as JSON: bytes, FLOPs, counts.")
    ] = False,
) -> None:
    """Show what a model is, how it would be converted and what that saves. Loads no weights.

    Example: [bold]fulmen inspect smollm2-135m[/]
    """
    with reporter().stage("Read"):
        from fulmen.pipeline.api_load import inspect

        description = inspect(source)
    if as_json:
        typer.echo(json.dumps(description.to_dict(), indent=2))
    else:
        _print_description(description, Console(highlight=False))


def _print_description(model: "ModelDescription", console: Console) -> None:
    facts = Table.grid(padding=(0, 2))
    facts.add_column(no_wrap=True)
    facts.add_column(overflow="fold")
    for name, value in model.facts():
        facts.add_row(f"[bold]{name}[/]", value)
    console.print(facts)
    console.print()
    console.print(_savings(model))
    for remark in model.remarks():
        console.print(remark)


def _savings(model: "ModelDescription") -> Table:
    from fulmen.pipeline.description import SAVINGS_TITLE

    header, *rows = model.savings()
    table = Table(title=SAVINGS_TITLE, title_justify="left", box=None)
    for name in header:
        # In two lines; "tokens" stands in the second.
        upper, _, lower = name.rpartition(" ")
        table.add_column(f"{upper}\n{lower}", justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table
