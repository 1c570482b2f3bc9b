"""What a run says of itself on stderr: bars on a terminal, plain lines anywhere else.

    with stage("Inherit") as advance:
        advance(3, 30, "KL 0.41")

Whatever a stage is busy with, a line comes every few seconds where there is no terminal: a thread of its own
writes it. Results go to stdout, which nothing here touches.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

# Of several processes (`accelerate launch`) the first one speaks.
console = Console(stderr=True, quiet=os.environ.get("RANK", "0") != "0")
LINE_EVERY_S = 5.0
# While torch and Transformers are imported.
STARTING = "Start"


class Advance(Protocol):
    """Says how far a stage is: what is done of how much, and a note beside it.

    Another total, or less than was done before, begins another part of the stage.
    """

    def __call__(self, done: float, total: float, note: str = "") -> None: ...


class Reporter(Protocol):
    """Whom a run tells how far it is."""

    def stage(self, title: str, counted: bool = True) -> AbstractContextManager[Advance]:
        """One piece of work, for the length of the block; `counted` shows "3/30", otherwise a percentage."""
        ...

    def note(self, text: str) -> None:
        """One line that stays."""
        ...


def reporter() -> Reporter:
    """The one that fits where stderr goes now, and this process."""
    if console.quiet:
        return SilentReporter()
    is_terminal = sys.stderr.isatty() and not console.is_dumb_terminal
    return TerminalReporter() if is_terminal else LineReporter()


def stage(title: str, counted: bool = True) -> AbstractContextManager[Advance]:
    """`Reporter.stage` of the reporter at hand."""
    return reporter().stage(title, counted)


def say(text: str) -> None:
    """`Reporter.note` of the reporter at hand."""
    reporter().note(text)


class Pace:
    """How far a stage is, and how long the rest will take at the pace of what is done."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.began = clock()
        self.done, self.total, self.note = 0.0, 0.0, ""
        self._first = self._last = (self.began, 0.0)

    def __call__(self, done: float, total: float, note: str = "") -> None:
        """As `Advance`."""
        now = self._clock()
        if total != self.total or done < self.done:
            self._first = self._last = (now, done)
        elif done > self.done:
            self._last = (now, done)
        self.done, self.total, self.note = done, total, note

    def finish(self) -> None:
        """All that was to be done is done, if that is less than was planned, too."""
        self.total = self.done

    @property
    def elapsed(self) -> float:
        """Seconds since the stage began."""
        return self._clock() - self.began

    @property
    def left(self) -> float | None:
        """Seconds that the rest will take; None while nothing tells, or if it took longer than thought."""
        (began, first), (ended, last) = self._first, self._last
        if last <= first or self.done >= self.total:
            return None
        seconds = (ended - began) / (last - first) * (self.total - last) - (self._clock() - ended)
        return seconds if seconds > 0 else None

    def words(self, counted: bool) -> str:
        """ "3/30, 0:41 elapsed, 6:10 left, KL 0.41"."""
        parts = [f"{in_minutes(self.elapsed)} elapsed"]
        if self.total:
            share = f"{self.done:g}/{self.total:g}" if counted else f"{self.done / self.total:.0%}"
            parts.insert(0, share)
        if self.left is not None:
            parts.append(f"{in_minutes(self.left)} left")
        return ", ".join([*parts, self.note] if self.note else parts)


class SilentReporter:
    """Of the processes that are not the first."""

    @contextmanager
    def stage(self, title: str, counted: bool = True) -> Iterator[Advance]:
        """As `Reporter.stage`."""
        yield Pace()

    def note(self, text: str) -> None:
        """As `Reporter.note`."""


class LineReporter:
    """Plain lines, for pipes, logs and notebooks: one every five seconds, whatever happens, and the last one.

    A stage of less than that, of which nobody knows how much there is to do, says nothing.
    """

    def __init__(self, every_s: float = LINE_EVERY_S) -> None:
        self._every_s = every_s

    def note(self, text: str) -> None:
        """As `Reporter.note`."""
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    @contextmanager
    def stage(self, title: str, counted: bool = True) -> Iterator[Advance]:
        """As `Reporter.stage`."""
        pace, ended = Pace(), threading.Event()
        beating = threading.Thread(target=self._beat, args=(title, pace, counted, ended), daemon=True)
        beating.start()
        outcome = "stopped at "
        try:
            yield pace
            pace.finish()
            outcome = ""
        finally:
            ended.set()
            beating.join()
            if pace.total or pace.elapsed > self._every_s:
                self.note(f"{title}: {outcome}{pace.words(counted)}")

    def _beat(self, title: str, pace: Pace, counted: bool, ended: threading.Event) -> None:
        # A closed pipe is found by what writes next in the main thread.
        with suppress(OSError, ValueError):
            while not ended.wait(self._every_s):
                self.note(f"{title}: {pace.words(counted)}")


class TerminalReporter:
    """A bar that moves while it lasts, and stays as it ended; without a total it goes when it ends."""

    def note(self, text: str) -> None:
        """As `Reporter.note`."""
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    @contextmanager
    def stage(self, title: str, counted: bool = True) -> Iterator[Advance]:
        """As `Reporter.stage`."""
        pace = Pace()
        columns = (TextColumn("[bold]{task.description:<10}"), BarColumn(), _PaceColumn(pace, counted))
        # What is printed to stdout meanwhile is a result, and stays there.
        with Progress(*columns, console=console, redirect_stdout=False) as bars:
            task = bars.add_task(title, total=None)

            def advance(done: float, total: float, note: str = "") -> None:
                pace(done, total, note)
                bars.update(task, completed=done, total=total or None)

            try:
                yield advance
                pace.finish()
                bars.update(task, completed=pace.done, total=pace.total)
            finally:
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


def in_minutes(seconds: float) -> str:
    """ "6:10", or "1:06:10"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class TrainingView:
    """A trainer's steps in a stage: their losses beside them; what comes between steps, as a note.

    Before the first step what is to be done has a bar of its own.
    """

    def __init__(self, advance: Advance) -> None:
        self._advance = advance
        self._at: tuple[int, int] | None = None

    def step(self, step: int, steps: int, logs: dict[str, float]) -> None:
        """A trainer's `on_step`."""
        self._at = (step, steps)
        self._advance(step, steps, ", ".join(f"{name} {value:.4f}" for name, value in logs.items()))

    def part(self, done: int, total: int, what: str) -> None:
        """A trainer's `on_part`."""
        if self._at is None:
            self._advance(done, total, what)
        else:
            self._advance(*self._at, f"{what} {done}/{total}")
