"""vLLM's OpenAI server as a child process: started, watched, started again after a crash, stopped."""

import asyncio
import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx

from fulmen.errors import EngineError, unwritable
from fulmen.serving.engine_settings import EngineSettings

POLL_S = 0.25
CHECK_S, CHECK_TIMEOUT_S, CHECKS_FAILED = 2.0, 10.0, 6
FIRST_BACKOFF_S, LONGEST_BACKOFF_S = 1.0, 60.0
# An engine that ran so long was sound: the next crash is a new one.
SOUND_S = 60.0
STOP_S = 20.0
NICE = 10
LOG_TAIL = 4000
_PR_SET_PDEATHSIG = 1


class Engine:
    """One engine and its life.

    Args:
        settings: what is started.
        log: file for what the engine prints; begun anew.
        say: gets a line when the engine is lost and when it is back.
    """

    def __init__(self, settings: EngineSettings, log: Path, say: Callable[[str], None]) -> None:
        self.settings, self.restarts = settings, 0
        self.url = ""
        self.log, self._say = log, say
        self._process: subprocess.Popen[bytes] | None = None
        self._ready = False
        self._watch: asyncio.Task[None] | None = None

    @property
    def ready(self) -> bool:
        """Whether it answers, as far as is known."""
        return self._ready and self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int | None:
        """Of the engine's first process."""
        return self._process.pid if self._process else None

    async def start(self) -> None:
        """Start it and wait until it answers. Raises EngineError, with its last words, if it ends before."""
        self._spawn()
        try:
            await self._until_ready()
        except BaseException:
            self._kill()
            raise
        self._watch = asyncio.create_task(self._keep())

    async def stop(self) -> None:
        """End it: asked first, killed after STOP_S."""
        if self._watch:
            self._watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watch
        self._ready = False
        if self._process and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            deadline = time.monotonic() + STOP_S
            while self._process.poll() is None and time.monotonic() < deadline:
                await asyncio.sleep(POLL_S)
        self._kill()

    def _spawn(self) -> None:
        port = _free_port()
        command = self.settings.command(port)
        self.url = f"http://127.0.0.1:{port}"
        try:
            self.log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            log = self.log.open("wb")
        except OSError as error:
            raise unwritable(self.log, error) from error
        with log:
            # A group of its own: Ctrl-C reaches the gateway alone, and all of the engine can be killed.
            self._process = subprocess.Popen(
                command,
                env=self.settings.environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_prepare_child if sys.platform == "linux" else None,
            )

    async def _until_ready(self) -> None:
        assert self._process
        async with httpx.AsyncClient(timeout=CHECK_TIMEOUT_S, trust_env=False) as client:
            while self._process.poll() is None:
                if await self._answers(client):
                    self._ready = True
                    return
                await asyncio.sleep(POLL_S)
        raise EngineError(
            f"vLLM ended with code {self._process.returncode}: {self._last_words()}; see {self.log}"
        )

    async def _keep(self) -> None:
        """Watch for ever; bring it back when it is lost."""
        backoff = FIRST_BACKOFF_S
        while True:
            started = time.monotonic()
            await self._until_lost()
            self._ready = False
            self._kill()
            if time.monotonic() - started > SOUND_S:
                backoff = FIRST_BACKOFF_S
            self._say(f"the engine is lost; starting it again in {backoff:.0f} s")
            await asyncio.sleep(backoff)
            backoff = min(2 * backoff, LONGEST_BACKOFF_S)
            try:
                self._spawn()
                await self._until_ready()
            except EngineError as error:
                self._say(str(error))
                continue
            self.restarts += 1
            self._say("the engine is back")

    async def _until_lost(self) -> None:
        """Return when the process has ended, or has not answered for long."""
        failed = 0
        async with httpx.AsyncClient(timeout=CHECK_TIMEOUT_S, trust_env=False) as client:
            while self._process and self._process.poll() is None and failed < CHECKS_FAILED:
                await asyncio.sleep(CHECK_S)
                failed = 0 if await self._answers(client) else failed + 1

    async def _answers(self, client: httpx.AsyncClient) -> bool:
        try:
            return (await client.get(f"{self.url}/health")).status_code == httpx.codes.OK
        except httpx.HTTPError:
            return False

    def _kill(self) -> None:
        """End what is left of the engine's processes."""
        if self._process:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _last_words(self) -> str:
        """The last line of the log that tells of an error, or its last line."""
        with contextlib.suppress(OSError):
            lines = self.log.read_bytes()[-LOG_TAIL:].decode("utf-8", "replace").split("\n")
            lines = [line.strip() for line in lines if line.strip()]
            errors = [line for line in lines if "Error" in line]
            return (errors or lines or ["it said nothing"])[-1][-300:]
        return "it left no log"


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _prepare_child() -> None:
    """A gateway that is killed takes its engine along, and one that has work to do goes before it.

    The gateway needs a core for milliseconds only; the engine's threads keep all of them busy.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    os.nice(NICE)
    # Where the kernel shares cores among sessions first, that is what counts.
    with contextlib.suppress(OSError):
        Path("/proc/self/autogroup").write_text(str(NICE), encoding="ascii")
