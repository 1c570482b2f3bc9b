"""What the engines of a server print, one after the other, in a file of bounded size."""

import contextlib
import os
import re
import shutil
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

from fulmen.errors import unwritable

# As much stays in the file, and as much in the one before it.
MOST_BYTES = 16 * 2**20
TAIL = 2**20
# How a traceback ends, behind vLLM's marks of a process and a place in its source.
RAISED = re.compile(r"(?:^|[\])] )(?:\w+\.)*(\w*(?:Error|Exception)(?:: .+)?)$")
PASSED_ON = re.compile(r"root cause|initialization failed")


class EngineLog:
    """`path`, and beside it what was there before under the same name with `.1`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._begun_at = 0

    def begin(self) -> BinaryIO:
        """Open it for one more engine, and note its start. Raises OutputError."""
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.bound()
            file = open(os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "ab")  # noqa: SIM115
            now = datetime.now().astimezone().isoformat(timespec="seconds")
            file.write(f"--- an engine is started, {now}\n".encode())
            file.flush()
        except OSError as error:
            raise unwritable(self.path, error) from error
        self._begun_at = self.path.stat().st_size
        return file

    def bound(self) -> None:
        """Copy what is there to a second file if it is too much; the engine, which appends, begins anew."""
        with contextlib.suppress(OSError):
            if self.path.stat().st_size > MOST_BYTES:
                copy = self.path.with_name(f"{self.path.name}.1")
                shutil.copyfile(self.path, copy)
                copy.chmod(0o600)
                os.truncate(self.path, 0)
                self._begun_at = 0

    def last_words(self) -> str:
        """Of the last engine: the error that it ended with, or its last line.

        vLLM's processes tell one another that one has failed, and only the first says why.
        """
        with contextlib.suppress(OSError):
            with self.path.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(size - TAIL, self._begun_at))
                lines = file.read().decode("utf-8", "replace").split("\n")
            lines = [line.strip() for line in lines if line.strip()]
            raised = [found[1] for line in lines if (found := RAISED.search(line))]
            causes = [error for error in raised if not PASSED_ON.search(error)]
            return (causes or raised or lines or ["it said nothing"])[-1][-300:]
        return "it left no log"
