"""Results on disk as they come, one JSON line each, so that an interrupted run goes on where it was."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fulmen.errors import OutputError, ResumeError
from fulmen.files import write_file

Key = tuple[str, str, int, int]
Progress = Callable[[int, int, str], None]


class Unit(NamedTuple):
    """A piece of work whose result is kept.

    key: suite, task, length, and number among those. tokens: what it reads, for the progress bar.
    run: does it; returns plain JSON types.
    """

    key: Key
    tokens: int
    run: Callable[[], dict[str, Any]]


class Journal:
    """A file of results that belongs to one model and one set of settings.

    Its first line holds these; each other line a key and a result. A last line that a crash
    cut short is dropped. Without a path nothing is kept for later.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any]) -> None:
        """Open or begin.

        Raises:
            ResumeError: the file holds results of another model or other settings.
            OutputError: the file cannot be read or written.
        """
        self.path = path
        self._results: dict[Key, dict[str, Any]] = {}
        if path is not None:
            self._open(path, settings)

    def _open(self, path: Path, settings: Mapping[str, Any]) -> None:
        try:
            lines = _whole_lines(path)
            if lines:
                self._require_same(json.loads(lines[0]), json.loads(json.dumps(settings)))
            self._results = {tuple(row["key"]): row["result"] for row in map(json.loads, lines[1:])}
            lines = lines or [json.dumps(settings)]
            write_file(path, "".join(f"{line}\n" for line in lines))
        except OSError as error:
            raise OutputError(
                f"{path} cannot be written: {error.strerror}; name another folder as out", arguments=["out"]
            ) from error
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ResumeError(
                f"{path} holds no results of fulmen; remove it or name another folder as out",
                arguments=["out"],
            ) from error

    def run(self, units: Iterable[Unit], progress: Progress = lambda done, total, what: None) -> list[dict]:
        """Do what is not done yet; return the results of all units, each with its `key`'s parts.

        Args:
            progress: called with (tokens read, tokens in all, what was read), of what was to be done.
        """
        units = list(units)
        waiting = self.waiting(units)
        done, total = 0, sum(unit.tokens for unit in waiting)
        for unit in waiting:
            self._append(unit.key, unit.run())
            done += unit.tokens
            suite, task, length, number = unit.key
            progress(done, total, f"{suite} {task} {length}, {number + 1}")
        names = ("suite", "task", "length", "number")
        return [{**dict(zip(names, unit.key, strict=True)), **self._results[unit.key]} for unit in units]

    def waiting(self, units: Iterable[Unit]) -> list[Unit]:
        """Those that are not done yet."""
        return [unit for unit in units if unit.key not in self._results]

    def _append(self, key: Key, result: dict[str, Any]) -> None:
        line = json.dumps({"key": key, "result": result}, allow_nan=False)
        try:
            if self.path is not None:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(f"{line}\n")
        except OSError as error:
            raise OutputError(f"{self.path} cannot be written: {error.strerror}") from error
        # As read from the file: a resumed run reports the same to the last digit.
        self._results[key] = json.loads(line)["result"]

    def _require_same(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
        if changed:
            changes = ", ".join(f"{key} was {before.get(key)!r}, is {now.get(key)!r}" for key in changed)
            raise ResumeError(
                f"{self.path} holds results of another run ({changes}); remove it or name another out",
                arguments=["out"],
            )


def _whole_lines(path: Path) -> list[str]:
    """The lines of a file but a last one without its end; none if there is no file."""
    if not path.exists():
        return []
    *lines, _ = path.read_text(encoding="utf-8").split("\n")
    return lines
