"""vLLM's OpenAI server as a child process: started, watched, started again after a crash, stopped."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import httpx

from fulmen.errors import EngineError
from fulmen.serving.engine import keeper
from fulmen.serving.engine.log import EngineLog
from fulmen.serving.engine.settings import EngineSettings

POLL_S = 0.25
CHECK_S, CHECK_TIMEOUT_S, CHECKS_FAILED = 2.0, 10.0, 6
FIRST_BACKOFF_S, LONGEST_BACKOFF_S = 1.0, 60.0
# An engine that ran so long was sound: the next crash is a new one.
SOUND_S = 60.0
STOP_S, KILL_S = 20.0, 10.0
SOCKET = "http"
# The name of a Unix socket has at most so many bytes on every system. vLLM makes some of its own, which are
# named by a UUID.
SOCKET_NAME_BYTES, UUID_BYTES = 103, 36


class Engine:
    """One engine and its life.

    It listens at a Unix socket in a folder that only this user may enter, and nowhere else.

    Args:
        settings: what is started.
        log: file for what the engine prints; those before it are kept.
        echo: gets a line when the engine is lost and when it is back.
    """

    url = "http://engine"

    def __init__(self, settings: EngineSettings, log: Path, echo: Callable[[str], None]) -> None:
        self.settings, self.restarts = settings, 0
        self.log, self._echo = EngineLog(log), echo
        self._home = tempfile.TemporaryDirectory(
            prefix="fulmen-", dir=_short_folder(), ignore_cleanup_errors=True
        )
        self.folder = Path(self._home.name)
        self._process: subprocess.Popen[bytes] | None = None
        self._lifeline: int | None = None
        self._ready = self._ending = False
        self._watch: asyncio.Task[None] | None = None

    @property
    def ready(self) -> bool:
        """Whether it answers, as far as is known."""
        return self._ready and self.pid is not None

    @property
    def pid(self) -> int | None:
        """Of its keeper, which starts and ends it; None if that has ended."""
        return self._process.pid if self._process and self._process.poll() is None else None

    def transport(self, limits: httpx.Limits) -> httpx.AsyncBaseTransport:
        """The way to it, the same after each start."""
        return httpx.AsyncHTTPTransport(uds=str(self.folder / SOCKET), limits=limits)

    async def start(self) -> None:
        """Start it and wait until it answers. Raises EngineError, with its last words, if it ends before."""
        try:
            self._spawn()
            await self._until_ready()
        except BaseException:
            await self._end()
            self._home.cleanup()
            raise
        self._watch = asyncio.create_task(self._keep())

    async def stop(self) -> None:
        """End it: asked first if it answers, killed after STOP_S."""
        if self._watch:
            self._watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watch
        if self._process and self.ready:
            self._ready = False
            self._process.send_signal(signal.SIGTERM)
            deadline = time.monotonic() + STOP_S
            while self.pid and not self._ending and time.monotonic() < deadline:
                await asyncio.sleep(POLL_S)
        await self._end()
        self._home.cleanup()

    def kill(self) -> None:
        """Have it killed, for good and at once; may be called by a signal's handler."""
        self._ready, self._ending = False, True
        if self._lifeline is not None:
            with contextlib.suppress(OSError):
                os.write(self._lifeline, b".")

    def _spawn(self) -> None:
        _make_empty(self.folder)
        command = self.settings.command(self.folder / SOCKET)
        theirs, ours = os.pipe()
        kept = [keeper.__file__, str(theirs), str(os.getpid()), str(self.folder), *command]
        try:
            with self.log.begin() as log:
                # A session of its own: Ctrl-C reaches the gateway alone.
                self._process = subprocess.Popen(
                    [sys.executable, "-P", *kept],
                    env=self.settings.environment(self.folder),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    pass_fds=(theirs,),
                )
        except BaseException:
            os.close(ours)
            raise
        finally:
            os.close(theirs)
        self._lifeline = ours

    async def _until_ready(self) -> None:
        assert self._process
        async with self._client() as client:
            while self.pid:
                if await self._answers(client):
                    self._ready = not self._ending
                    return
                await asyncio.sleep(POLL_S)
        code = self._process.returncode
        raise EngineError(f"vLLM ended with code {code}: {self.log.last_words()}; see {self.log.path}")

    async def _keep(self) -> None:
        """Watch for ever; bring it back when it is lost."""
        backoff = FIRST_BACKOFF_S
        while True:
            started = time.monotonic()
            await self._until_lost()
            self._ready = False
            if self._ending:
                return
            await self._end()
            if time.monotonic() - started > SOUND_S:
                backoff = FIRST_BACKOFF_S
            said = f"its last words: {self.log.last_words()}; see {self.log.path}"
            self._echo(f"the engine is lost, {said}; starting it again in {backoff:.0f} s")
            await asyncio.sleep(backoff)
            backoff = min(2 * backoff, LONGEST_BACKOFF_S)
            try:
                self._spawn()
                await self._until_ready()
            except EngineError as error:
                self._echo(str(error))
                continue
            self.restarts += 1
            self._echo("the engine is back")

    async def _until_lost(self) -> None:
        """Return when the process has ended, or has not answered for long."""
        failed = 0
        async with self._client() as client:
            while self.pid and not self._ending and failed < CHECKS_FAILED:
                await asyncio.sleep(CHECK_S)
                self.log.bound()
                failed = 0 if await self._answers(client) else failed + 1

    def _client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            transport=self.transport(httpx.Limits()), timeout=CHECK_TIMEOUT_S, trust_env=False
        )

    async def _answers(self, client: httpx.AsyncClient) -> bool:
        try:
            return (await client.get(f"{self.url}/health")).status_code == httpx.codes.OK
        except httpx.HTTPError:
            return False

    async def _end(self) -> None:
        """End all of the engine's processes now: its keeper does, and if it cannot, their group is killed."""
        if self._process is None or self._lifeline is None:
            return
        with contextlib.suppress(OSError):
            os.write(self._lifeline, b".")
        with contextlib.suppress(subprocess.TimeoutExpired):
            await asyncio.to_thread(self._process.wait, KILL_S)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._lifeline)
        self._lifeline = None


def _make_empty(folder: Path) -> None:
    """What an engine left there would be in the next one's way; a cleaner of old files may have taken all."""
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise EngineError(f"{folder} is another user's; start the server again, which takes another folder")
    for left in folder.iterdir():
        left.unlink()


def _short_folder() -> str:
    """Where a folder's sockets have names that are short enough.

    Not XDG_RUNTIME_DIR, which goes away when its user logs out, under a server that is to go on.
    """
    place = tempfile.gettempdir()
    longest = len(os.fsencode(place)) + len("/fulmen-12345678/") + UUID_BYTES
    return place if longest <= SOCKET_NAME_BYTES else "/tmp"
