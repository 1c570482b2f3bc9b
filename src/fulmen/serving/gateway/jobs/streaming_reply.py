"""A job's answer on its way to the client: status, keep-alive while queued, an eye on whether it is gone."""

import asyncio
import contextlib
import time

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from fulmen.serving.gateway.errors import ApiError, respond
from fulmen.serving.gateway.gateway import Gateway
from fulmen.serving.gateway.jobs.engine_job import EngineJob, EngineRequest

STREAM, PLAIN = "text/event-stream; charset=utf-8", "application/json"


class StreamingReply(Response):
    """Runs a request when the server sends it.

    Nothing is sent before the job's first word, or `keep_alive_s` after it was admitted, so that an early
    error has its own status; after that the status is 200 and something goes out every `keep_alive_s`: a
    comment in a stream, else an empty line. An error then is an event of a stream; other answers break off.
    """

    def __init__(self, gateway: Gateway, request: EngineRequest) -> None:
        super().__init__()
        self._gateway, self._request = gateway, request
        self._began = self._timed = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        started = time.perf_counter()
        try:
            with self._gateway.limiter.hold(self._request.account):
                await self._run(scope, receive, send, started)
        except ApiError as error:
            self._gateway.metrics.ended(self._request.endpoint, "refused")
            await respond(error, scope["path"])(scope, receive, send)

    async def _run(self, scope: Scope, receive: Receive, send: Send, started: float) -> None:
        job = EngineJob(self._gateway, self._request)
        leaving = asyncio.create_task(until_gone(receive))
        talking = asyncio.create_task(self._talk(job, scope, receive, send, started))
        try:
            await asyncio.wait({leaving, talking}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            leaving.cancel()
            talking.cancel()
            job.drop()
            # The slot is free when the engine is done with the request too.
            self._gateway.keep(job.task)
            await asyncio.shield(asyncio.wait([job.task]))
            with contextlib.suppress(asyncio.CancelledError, OSError):
                await talking

    async def _talk(self, job: EngineJob, scope: Scope, receive: Receive, send: Send, started: float) -> None:
        while True:
            try:
                piece = await asyncio.wait_for(job.pieces.get(), self._gateway.keep_alive_s)
            except TimeoutError:
                # Until then the request may be refused, with a status of its own.
                if job.admitted:
                    await self._send(send, b": keep-alive\n\n" if self._request.streams else b"\n")
                continue
            if piece is None:
                break
            if isinstance(piece, ApiError):
                if not self._began:
                    await respond(piece, scope["path"])(scope, receive, send)
                    return
                if not self._request.streams:
                    # 200 has been sent. What breaks off is no answer; an error's body would be one.
                    return
                await self._send(send, self._request.dialect.broken(piece))
                continue
            await self._send(send, piece)
            self._time(job, started)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send, piece: bytes) -> None:
        if not self._began:
            self._began = True
            kind = STREAM if self._request.streams else PLAIN
            headers = {"content-type": kind, "cache-control": "no-cache", "x-request-id": self._request.id}
            raw = [(name.encode(), value.encode()) for name, value in headers.items()]
            await send({"type": "http.response.start", "status": 200, "headers": raw})
        await send({"type": "http.response.body", "body": piece, "more_body": True})

    def _time(self, job: EngineJob, started: float) -> None:
        """Observe the first token, once."""
        if self._request.streams and not self._timed:
            self._timed, now = True, time.perf_counter()
            self._gateway.metrics.first_token.observe(now - started)
            self._gateway.metrics.overhead.observe(job.asked_at - started + now - job.first_at)


async def until_gone(receive: Receive) -> None:
    """Return when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass
