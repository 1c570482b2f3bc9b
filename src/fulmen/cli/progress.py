"""Progress bars with the time left, on stderr."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

# Of several processes (`accelerate launch`) the first one speaks.
console = Console(stderr=True, quiet=os.environ.get("RANK", "0") != "0")


class Advance(Protocol):
    """Sets a bar: what is done of how much, and a note beside it."""

    def __call__(self, done: float, total: float, note: str = "") -> None: ...


@contextmanager
def progress_bar(title: str, counted: bool = True) -> Iterator[Advance]:
    """One bar for the length of the block; `counted` shows "3/30" where the numbers mean something."""
    columns = [TextColumn("[bold]{task.description:<10}"), BarColumn()]
    columns += [MofNCompleteColumn()] if counted else [TextColumn("{task.percentage:>3.0f}%")]
    columns += [
        TimeElapsedColumn(),
        TextColumn("elapsed,"),
        TimeRemainingColumn(),
        TextColumn("left [dim]{task.fields[note]}"),
    ]
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(title, total=None, note="")

        def advance(done: float, total: float, note: str = "") -> None:
            bar.update(task, completed=done, total=total, note=note)

        yield advance


def show_losses(advance: Advance) -> Callable[[int, int, dict[str, float]], None]:
    """A trainer's `on_step`: its step, and its losses beside the bar."""
    return lambda step, steps, logs: advance(
        step, steps, ", ".join(f"{name} {value:.4f}" for name, value in logs.items())
    )


def say(text: str) -> None:
    """One line for the user, on stderr."""
    console.print(text, highlight=False, soft_wrap=True)
