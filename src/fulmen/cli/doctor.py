"""`fulmen doctor`: what computes each operation on this machine, why not something faster, and versions."""

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fulmen.cli.progress import reporter
from fulmen.pipeline.doctor import Choice, Diagnosis, diagnose


def doctor_command(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print everything as JSON: every operation, device and dtype.")
    ] = False,
) -> None:
    """Show which backend computes each operation on this machine, why the others do not, and versions.

    Example: [bold]fulmen doctor[/]
    """
    with reporter().stage("Look"):
        found = diagnose()
    if as_json:
        choices = [choice._asdict() for choice in found.choices]
        typer.echo(json.dumps({"facts": found.facts, "pin": found.pin, "choices": choices}, indent=2))
    else:
        _print(found, Console(highlight=False))


def _print(found: Diagnosis, console: Console) -> None:
    from fulmen.ops.dispatch import BACKEND_VARIABLE

    facts = Table.grid(padding=(0, 2))
    facts.add_column(no_wrap=True)
    facts.add_column(overflow="fold")
    pin = {"pinned": f"{BACKEND_VARIABLE}={found.pin}"} if found.pin else {}
    for name, value in (found.facts | pin).items():
        facts.add_row(f"[bold]{name}[/]", value)
    console.print(facts)
    for device in dict.fromkeys(choice.device for choice in found.choices):
        choices = [choice for choice in found.choices if choice.device == device]
        console.print()
        console.print(_table(device, choices))
        if any(choice.backend is None for choice in choices):
            console.print(
                f"none: {BACKEND_VARIABLE}={found.pin} cannot compute this, and raises; unset the variable "
                "or set it to torch",
                soft_wrap=True,
            )
        console.print()
        console.print(_reasons(choices))


def _table(device: str, choices: list[Choice]) -> Table:
    table = Table(title=f"What computes on {device}", title_justify="left", box=None)
    dtypes = list(dict.fromkeys(choice.dtype for choice in choices))
    for name in ("operation", *dtypes):
        table.add_column(name, no_wrap=True)
    for operation in dict.fromkeys(choice.operation for choice in choices):
        row = [choice.backend or "none" for choice in choices if choice.operation == operation]
        table.add_row(operation, *row)
    return table


def _reasons(choices: list[Choice]) -> Table:
    """One row for each reason that some backend has, with the operations and dtypes that it holds for."""
    places: dict[tuple[str, str], list[Choice]] = {}
    for choice in choices:
        for backend, reason in choice.against.items():
            words = reason or "could compute it too, and is not chosen here"
            places.setdefault((backend, words), []).append(choice)
    table = Table(title="Why not the others", title_justify="left", box=None)
    for name in ("backend", "not for", "because"):
        table.add_column(name, overflow="fold")
    for (backend, reason), held in sorted(places.items(), key=lambda item: item[0][0]):
        table.add_row(backend, _where(held, choices), escape(reason))
    return table


def _where(held: list[Choice], choices: list[Choice]) -> str:
    """ "all", or operations, with their dtypes where these are not all."""
    if len(held) == len(choices):
        return "all"
    n_dtypes = len({choice.dtype for choice in choices})
    operations_of: dict[tuple[str, ...], list[str]] = {}
    for operation in dict.fromkeys(choice.operation for choice in held):
        dtypes = tuple(choice.dtype for choice in held if choice.operation == operation)
        operations_of.setdefault(dtypes, []).append(operation)
    return "; ".join(
        ", ".join(operations) + (f" in {', '.join(dtypes)}" if len(dtypes) < n_dtypes else "")
        for dtypes, operations in operations_of.items()
    )
