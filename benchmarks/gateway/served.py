"""`fulmen serve` as a process of its own, for the benchmarks of the gateway."""

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import psutil

READY = "ready at "


class Served(NamedTuple):
    """A running server: its address, its process, and its state folder."""

    url: str
    process: psutil.Process
    state: Path

    def engine(self) -> psutil.Process:
        """The engine's first process. Raises StopIteration while there is none."""
        below = self.process.children(recursive=True)
        return next(p for p in below if p.cmdline()[1:3] == ["-m", "vllm.entrypoints.openai.api_server"])

    def engine_socket(self) -> str:
        """The Unix socket at which the engine listens."""
        command = self.engine().cmdline()
        return command[command.index("--uds") + 1]

    def engine_key(self) -> str:
        """What the engine asks of its callers."""
        return self.engine().environ()["VLLM_API_KEY"]


@contextmanager
def served(model_dir: Path, *flags: str) -> Iterator[Served]:
    """Serve a model with an empty ledger, on a free port, until the end of the block."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "fulmen.cli.main", "serve", str(model_dir), "--port", "0"]
        command += ["--state", folder, *(["--", *flags] if flags else [])]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, bufsize=1) as process:
            assert process.stdout
            try:
                line = next((line for line in process.stdout if READY in line), "")
                if not line:
                    raise SystemExit(f"the server ended with code {process.wait()}")
                yield Served(line.strip().partition(READY)[2], psutil.Process(process.pid), Path(folder))
            finally:
                process.terminate()
                process.wait()
