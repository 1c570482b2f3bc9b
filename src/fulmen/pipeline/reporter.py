"""Whom a run tells how far it is: nobody, or lines of text. `fulmen.cli.progress` has bars for terminals.

    with reporter.stage("Inherit"):
        reporter.advance(3, 30, "KL 0.41")

Three methods are all that ties progress to the work; an object of any class that has them will do. What a
run finds is returned, never printed.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Protocol, TextIO

from fulmen.errors import ConfigError
from fulmen.evaluation.wording import percent

LINE_EVERY_S = 5.0
METHODS = ("stage", "advance", "note")


class Reporter(Protocol):
    """Whom a run tells how far it is."""

    def stage(self, name: str, counted: bool = True) -> AbstractContextManager[None]:
        """One piece of work, for the length of the block; `counted`: its numbers count things, as layers."""
        ...

    def advance(self, done: float, total: float, detail: str = "") -> None:
        """How much of the stage under way is done.

        Another total, or less than was done before, begins another part of the stage.
        """
        ...

    def note(self, text: str) -> None:
        """One line that stays."""
        ...


def reporter_of(reporter: Reporter | None) -> Reporter:
    """The one that was given, or silence: for None, and in every process of a run but the main one.

    Raises ConfigError for an object without the three methods.
    """
    if reporter is None:
        return SilentReporter()
    if isinstance(reporter, type) or not all(callable(getattr(reporter, name, None)) for name in METHODS):
        raise ConfigError(
            f"reporter={reporter!r} cannot be; give an object with the methods {', '.join(METHODS)}, "
            "as fulmen.LineReporter()",
            arguments=["reporter"],
        )
    return reporter if os.environ.get("RANK", "0") == "0" else SilentReporter()


class Pace:
    """How far a stage is, and how long the rest will take at the pace of what is done."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.began = clock()
        self.done, self.total, self.detail = 0.0, 0.0, ""
        self._first = self._last = (self.began, 0.0)

    def advance(self, done: float, total: float, detail: str = "") -> None:
        """As `Reporter.advance`."""
        now = self._clock()
        if total != self.total or done < self.done:
            self._first = self._last = (now, done)
        elif done > self.done:
            self._last = (now, done)
        self.done, self.total, self.detail = done, total, detail

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
            share = f"{self.done:g}/{self.total:g}" if counted else percent(self.done / self.total, 0)
            parts.insert(0, share)
        if self.left is not None:
            parts.append(f"{in_minutes(self.left)} left")
        return ", ".join([*parts, self.detail] if self.detail else parts)


class SilentReporter:
    """Nobody."""

    @contextmanager
    def stage(self, name: str, counted: bool = True) -> Iterator[None]:
        """As `Reporter.stage`."""
        yield

    def advance(self, done: float, total: float, detail: str = "") -> None:
        """As `Reporter.advance`."""

    def note(self, text: str) -> None:
        """As `Reporter.note`."""


class LineReporter:
    """Plain lines, for pipes, logs and notebooks: one every few seconds, whatever happens, and a last one.

    A stage of less than that, of which nobody knows how much there is to do, says nothing. A thread writes
    the lines, so that one long step is not silent.

    Args:
        file: where to; None: stderr.
        every_s: seconds between lines.
    """

    def __init__(self, file: TextIO | None = None, every_s: float = LINE_EVERY_S) -> None:
        self._file, self._every_s = file, every_s
        self._under_way: list[Pace] = []

    def note(self, text: str) -> None:
        """As `Reporter.note`."""
        file = sys.stderr if self._file is None else self._file
        # In one piece: another thread may write, too.
        file.write(f"{text}\n")
        file.flush()

    def advance(self, done: float, total: float, detail: str = "") -> None:
        """As `Reporter.advance`."""
        if self._under_way:
            self._under_way[-1].advance(done, total, detail)

    @contextmanager
    def stage(self, name: str, counted: bool = True) -> Iterator[None]:
        """As `Reporter.stage`."""
        pace, ended = Pace(), threading.Event()
        self._under_way.append(pace)
        beating = threading.Thread(target=self._beat, args=(name, pace, counted, ended), daemon=True)
        beating.start()
        outcome = "stopped at "
        try:
            yield
            pace.finish()
            outcome = ""
        finally:
            ended.set()
            beating.join()
            self._under_way.remove(pace)
            if pace.total or pace.elapsed > self._every_s:
                self.note(f"{name}: {outcome}{pace.words(counted)}")

    def _beat(self, name: str, pace: Pace, counted: bool, ended: threading.Event) -> None:
        # A closed pipe is found by what writes next in the main thread.
        with suppress(OSError, ValueError):
            while not ended.wait(self._every_s):
                if pace is self._under_way[-1]:
                    self.note(f"{name}: {pace.words(counted)}")


def in_minutes(seconds: float) -> str:
    """ "6:10", or "1:06:10"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def roughly(seconds: float) -> str:
    """ "50 s", "6 min", or "2 h 10 min", of what is only estimated."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


class TrainingView:
    """A trainer's steps in a stage: their losses beside them; what comes between steps, as a detail.

    Before the first step what is to be done is counted by itself.
    """

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self._at: tuple[int, int] | None = None

    def step(self, step: int, steps: int, logs: dict[str, float]) -> None:
        """A trainer's `on_step`."""
        self._at = (step, steps)
        losses = ", ".join(f"{name} {value:.4f}" for name, value in logs.items())
        self._reporter.advance(step, steps, losses)

    def part(self, done: int, total: int, what: str) -> None:
        """A trainer's `on_part`."""
        if self._at is None:
            self._reporter.advance(done, total, what)
        else:
            self._reporter.advance(*self._at, f"{what} {done}/{total}")
