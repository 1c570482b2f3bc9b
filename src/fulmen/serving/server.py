"""Engine and gateway together: started, served until a signal, drained, stopped."""

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import uvicorn

from fulmen.errors import ConfigError
from fulmen.serving.books import Books, running
from fulmen.serving.engine import Engine
from fulmen.serving.engine_settings import EngineSettings
from fulmen.serving.gateway.app import Gateway, create_app
from fulmen.serving.gateway.connection import Connection, allow_files

LOOPBACK = ("127.0.0.1", "::1", "localhost")
ENGINE_LOG = "engine.log"
DRAIN_S = 600
# Connections that wait to be accepted.
BACKLOG = 2048


def serve(
    settings: EngineSettings, books: Books, state: Path, host: str, port: int, say: Callable[[str], None]
) -> None:
    """Serve until SIGINT or SIGTERM; `say` gets lines for whoever started it.

    Raises:
        ConfigError: an address that is taken or is no address, or one open to others without any key.
        EngineError: the engine does not start.
        AccountError: another server uses the state folder.
    """
    if host not in LOOPBACK and not len(books.accounts):
        raise ConfigError(f"host={host} lets others in, and there is no key; make one: fulmen keys add NAME")
    allow_files()
    with running(state), contextlib.closing(listen(host, port)) as listener:
        if left := books.ledger.recover():
            say(f"{left} requests that the last run left open were charged for what they had got")
        # uvicorn's choice: uvloop where there is one.
        with asyncio.Runner(loop_factory=uvicorn.Config("").get_loop_factory()) as runner:
            runner.run(_serve(Engine(settings, state / ENGINE_LOG, say), books, listener, say))


async def _serve(engine: Engine, books: Books, listener: socket.socket, say: Callable[[str], None]) -> None:
    gateway = Gateway(engine.settings.model, engine, books)
    config = uvicorn.Config(
        create_app(gateway),
        http=Connection,
        ws="none",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=DRAIN_S,
        timeout_keep_alive=75,
    )
    say(f"starting vLLM for {engine.settings.model.place} (its log: {engine.log})")
    try:
        await engine.start()
        host, port = listener.getsockname()[:2]
        say(f"ready at http://{f'[{host}]' if ':' in host else host}:{port}")
        await Server(config, gateway, say).serve([listener])
    finally:
        await engine.stop()
    say("stopped")


class Server(uvicorn.Server):
    """Ends in good order: the first signal lets open requests finish, the second one ends them."""

    def __init__(self, config: uvicorn.Config, gateway: Gateway, say: Callable[[str], None]) -> None:
        super().__init__(config)
        self._gateway, self._say = gateway, say
        self.should_exit: bool = False

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As the base class, but an end that was asked for is not raised as an interrupt afterwards."""
        asked = {kind: signal.signal(kind, self.handle_exit) for kind in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for kind, handler in asked.items():
                signal.signal(kind, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """First signal: drain. Second: stop now."""
        if self.should_exit:
            self.force_exit = True
            return
        self.should_exit = True
        if count := len(self._gateway.slots):
            self._say(f"waiting for {count} open requests; Ctrl-C again ends them")


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
            f"{host}:{port} cannot be served at ({reason}); use another --host or --port"
        ) from error
    listener.listen(BACKLOG)
    return listener
