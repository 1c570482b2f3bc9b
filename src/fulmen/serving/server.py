"""Engine and gateway together: started, served until a signal, drained, stopped."""

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import uvicorn
from fastapi import FastAPI

from fulmen.errors import ConfigError
from fulmen.serving.billing.store import BillingStore, running
from fulmen.serving.engine.process import Engine
from fulmen.serving.engine.settings import EngineSettings
from fulmen.serving.gateway.admission.connection import Connection, allow_files
from fulmen.serving.gateway.app import create_app
from fulmen.serving.gateway.gateway import Gateway
from fulmen.serving.gateway.questions.desk import QuestionDesk

LOOPBACK = ("127.0.0.1", "::1", "localhost")
ENGINE_LOG = "engine.log"
DRAIN_S, FORCE_S = 600, 2.0
# Connections that wait to be accepted.
BACKLOG = 2048


# A block that takes long, by its title.
Stage = Callable[[str], contextlib.AbstractContextManager[object]]


def serve(
    settings: EngineSettings,
    billing: BillingStore,
    state: Path,
    host: str,
    port: int,
    echo: Callable[[str], None],
    stage: Stage = contextlib.nullcontext,
    desk: QuestionDesk | None = None,
) -> int:
    """Serve until a signal; `echo` gets lines for whoever started it, `stage` surrounds the engine's start.

    With a `desk`, questions about its folder are answered too.

    Returns an exit code: 0 after an end in good order; 128 and the signal's number where that ended the start
    or, as the second one, open requests.

    Raises:
        ConfigError: an address that is taken or is no address, or one open to others without any key.
        EngineError: the engine does not start.
        AccountError: another server uses the state folder.
    """
    if host not in LOOPBACK and not len(billing.accounts):
        raise ConfigError(f"host={host} lets others in, and there is no key; make one: fulmen keys add NAME")
    allow_files()
    with running(state), contextlib.closing(listen(host, port)) as listener:
        if left := billing.ledger.recover():
            echo(f"{left} requests that the last run left open were charged for what they had got")
        # uvicorn's choice: uvloop where there is one.
        with asyncio.Runner(loop_factory=uvicorn.Config("").get_loop_factory()) as runner:
            engine = Engine(settings, state / ENGINE_LOG, echo)
            return runner.run(_serve(engine, billing, listener, echo, stage, desk))


async def _serve(
    engine: Engine,
    billing: BillingStore,
    listener: socket.socket,
    echo: Callable[[str], None],
    stage: Stage,
    desk: QuestionDesk | None,
) -> int:
    gateway = Gateway(engine.settings.model, engine, billing)
    server = Server(create_app(gateway, desk), gateway, echo)
    echo(f"starting vLLM for {engine.settings.model.place} (its log: {engine.log.path})")
    with server.signals():
        # Before the engine is ready, so that clients who come too early are told.
        serving = asyncio.create_task(server.serve([listener]))
        try:
            with stage("Start vLLM"):
                ready = await _is_started(engine, serving)
            if ready:
                host, port = listener.getsockname()[:2]
                echo(f"ready at http://{f'[{host}]' if ':' in host else host}:{port}")
                await serving
        finally:
            server.should_exit = True
            await serving
            await engine.stop()
            await gateway.close()
    echo("stopped" if ready else "stopped before it was ready")
    return 128 + server.signal if server.forced or not ready else 0


async def _is_started(engine: Engine, serving: asyncio.Task[None]) -> bool:
    """Whether the engine was started before the serving ended. Raises EngineError if it cannot be."""
    starting = asyncio.create_task(engine.start())
    await asyncio.wait({serving, starting}, return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        starting.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await starting
        return True
    return False


class Server(uvicorn.Server):
    """Ends in good order: the first signal lets open requests finish, the second one ends them.

    Attributes:
        signal: the last one.
        forced: whether it was not the first.
    """

    def __init__(self, app: FastAPI, gateway: Gateway, echo: Callable[[str], None]) -> None:
        config = uvicorn.Config(
            app,
            http=Connection,
            ws="none",
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=DRAIN_S,
            timeout_keep_alive=75,
        )
        super().__init__(config)
        self._gateway, self._echo = gateway, echo
        self.signal, self.forced = 0, False
        self.should_exit: bool = False

    def capture_signals(self) -> contextlib.AbstractContextManager[None]:  # type: ignore[override]
        """`signals` does, for longer than the serving: the engine starts and stops meanwhile."""
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """Answer signals to end; under nohup a terminal that closes is none."""
        self._loop = asyncio.get_running_loop()
        kinds = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            kinds.append(signal.SIGHUP)
        asked = {kind: signal.signal(kind, self.handle_exit) for kind in kinds}
        try:
            yield
        finally:
            for kind, handler in asked.items():
                signal.signal(kind, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """First signal: drain. Second: stop now, by the engine's end, which ends what it answers."""
        self.signal = sig
        if not self.should_exit:
            self.should_exit = True
            if count := len(self._gateway.limiter):
                self._echo(f"waiting for {count} open requests; Ctrl-C again ends them")
            return
        self.forced = True
        self._gateway.engine.kill()
        # Answers that are cut off are no errors of the server's.
        logging.getLogger("uvicorn.error").disabled = True
        self._loop.call_soon_threadsafe(self._loop.call_later, FORCE_S, self._force)

    def _force(self) -> None:
        """Wait no longer for clients that do not take their answers."""
        self.force_exit = True


def listen(host: str, port: int) -> socket.socket:
    """A socket at this address, taken now: a mistake is known before the engine starts.

    Raises ConfigError for an address that is taken or is none.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio turns off Nagle's algorithm only where TCP is named. With it on, the first token would wait for
    # the client to acknowledge the headers.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            f"{host}:{port} cannot be served at ({reason}); use another host or port",
            arguments=["host", "port"],
        ) from error
    listener.listen(BACKLOG)
    return listener
