"""`fulmen doctor`: what computes each operation on this machine, why not something faster, and versions."""

import json
import os
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any, NamedTuple

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fulmen.errors import BackendError

LIBRARIES = ("fulmen", "torch", "transformers", "triton")


class Choice(NamedTuple):
    """What computes one operation.

    Attributes:
        backend: None where the pinned one cannot.
        against: for every other backend why it cannot; None: it could, and is not chosen here.
    """

    device: str
    operation: str
    dtype: str
    backend: str | None
    against: dict[str, str | None]


class Diagnosis(NamedTuple):
    """All that the command prints; `pin` is the value of FULMEN_BACKEND."""

    facts: dict[str, str]
    pin: str | None
    choices: list[Choice]


def doctor_command(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print everything as JSON: every operation, device and dtype.")
    ] = False,
) -> None:
    """Show which backend computes each operation on this machine, why the others do not, and versions.

    Example: [bold]fulmen doctor[/]
    """
    found = diagnose()
    if as_json:
        choices = [choice._asdict() for choice in found.choices]
        typer.echo(json.dumps({"facts": found.facts, "pin": found.pin, "choices": choices}, indent=2))
    else:
        _print(found, Console(highlight=False))


def diagnose() -> Diagnosis:
    """Ask about every operation on every device and dtype.

    Raises BackendError if FULMEN_BACKEND names no backend.
    """
    import torch

    from fulmen.ops.dispatch import (
        BACKEND_DTYPES,
        BACKEND_VARIABLE,
        BACKENDS,
        current_backend_name,
        operations,
    )

    pin = current_backend_name(os.environ.get(BACKEND_VARIABLE, "")) or None
    if pin and pin not in BACKENDS:
        raise BackendError(
            f"{BACKEND_VARIABLE}={pin!r} names no backend; set it to {', '.join(BACKENDS)}, or unset it"
        )
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    choices = [
        _choice(device, operation, dtype)
        for device in devices
        for operation in operations()
        for dtype in BACKEND_DTYPES
    ]
    return Diagnosis(_facts(), pin, choices)


def _choice(device: str, operation: str, dtype: Any) -> Choice:
    from fulmen.ops.dispatch import BACKENDS, reason_against_backend, resolve

    backend = None
    # A pinned one that cannot: its reason stands among those against the others.
    with suppress(BackendError):
        backend = resolve(operation, device, dtype)
    others = (name for name in BACKENDS if name != backend)
    against = {name: reason_against_backend(name, operation, device, dtype) for name in others}
    return Choice(device, operation, str(dtype).removeprefix("torch."), backend, against)


def _facts() -> dict[str, str]:
    import torch

    from fulmen.evaluation.provenance import processor_name
    from fulmen.ops.cpp.library import cpp_reason, cpp_simd

    reason = cpp_reason()
    facts = {name: _version(name) for name in ("python", *LIBRARIES)}
    facts["CPU"] = f"{processor_name()}, {os.cpu_count()} cores"
    facts["threads"] = str(torch.get_num_threads())
    facts["C++ kernels"] = (
        f"cannot run: {reason}" if reason else f"built for {', '.join(cpp_simd()) or 'no vector extension'}"
    )
    if torch.cuda.is_available():
        facts["GPU"] = torch.cuda.get_device_name()
    return facts


def _version(name: str) -> str:
    if name == "python":
        return platform.python_version()
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


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
