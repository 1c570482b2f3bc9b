"""What the program says of a run on stderr: bars on a terminal, plain lines anywhere else.

Results go to stdout, which nothing here touches.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.text import Text

from fulmen.pipeline.reporter import LineReporter, Pace, Reporter, SilentReporter

# Of several processes (`accelerate launch`) the main one speaks.
console = Console(stderr=True, quiet=os.environ.get("RANK", "0") != "0")
# While torch and Transformers are imported.
STARTING = "Start"


def reporter() -> Reporter:
    """The one that fits where stderr goes now, and this process."""
    if console.quiet:
        return SilentReporter()
    is_terminal = sys.stderr.isatty() and not console.is_dumb_terminal
    return TerminalReporter() if is_terminal else LineReporter()


class TerminalReporter:
    """A bar that moves while it lasts, and stays as it ended; without a total it goes when it ends."""

    def __init__(self) -> None:
        self._bar: tuple[Pace, Progress, TaskID] | None = None

    def note(self, text: str) -> None:
        """As `Reporter.note`."""
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    def advance(self, done: float, total: float, detail: str = "") -> None:
        """As `Reporter.advance`."""
        if self._bar is not None:
            pace, bars, task = self._bar
            pace.advance(done, total, detail)
            bars.update(task, completed=done, total=total or None)

    @contextmanager
    def stage(self, name: str, counted: bool = True) -> Iterator[None]:
        """As `Reporter.stage`; a stage inside another one is part of it."""
        if self._bar is not None:
            yield
            return
        pace = Pace()
        columns = (TextColumn("[bold]{task.description:<10}"), BarColumn(), _PaceColumn(pace, counted))
        # What is printed to stdout meanwhile is a result, and stays there.
        with Progress(*columns, console=console, redirect_stdout=False) as bars:
            task = bars.add_task(name, total=None)
            self._bar = (pace, bars, task)
            try:
                yield
                pace.finish()
                bars.update(task, completed=pace.done, total=pace.total)
            finally:
                self._bar = None
                bars.live.transient = not pace.total


class _PaceColumn(ProgressColumn):
    """`Pace.words`, drawn anew each time."""

    max_refresh = 0.5

    def __init__(self, pace: Pace, counted: bool) -> None:
        super().__init__()
        self.pace, self.counted = pace, counted

    def render(self, task: Task) -> Text:
        """The words, cut where the terminal ends."""
        return Text(self.pace.words(self.counted), no_wrap=True, overflow="ellipsis")
