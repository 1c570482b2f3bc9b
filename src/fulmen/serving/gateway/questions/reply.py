"""The events of a question on their way to the client; the process ends when it leaves."""

import asyncio
import contextlib
import json
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from fulmen.serving.billing.accounts import Account
from fulmen.serving.gateway.errors import ApiError, respond
from fulmen.serving.gateway.gateway import Gateway
from fulmen.serving.gateway.jobs.streaming_reply import STREAM, until_gone
from fulmen.serving.gateway.questions.desk import QuestionDesk

LOST = {"event": "error", "message": "the question was lost; the server's log says why", "param": None}
LAST = ("answer", "error")


class QuestionReply(Response):
    """Runs a question when the server sends it, and streams what happens as server-sent events.

    Nothing is sent before the first step, or `keep_alive_s`, so that what is wrong with the request has a
    status of its own; an error after that is an event. Every `keep_alive_s` something goes out: a comment.
    """

    def __init__(
        self, gateway: Gateway, desk: QuestionDesk, account: Account, question: dict[str, Any]
    ) -> None:
        super().__init__()
        self._gateway, self._desk, self._account, self._question = gateway, desk, account, question
        self._began = False
        self._outcome = "dropped"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one question."""
        try:
            with self._desk.limiter.hold(self._account):
                await self._run(receive, send)
        except ApiError as error:
            self._outcome = "refused"
            await respond(error, scope["path"])(scope, receive, send)
        finally:
            self._gateway.metrics.ended(scope["path"], self._outcome)

    async def _run(self, receive: Receive, send: Send) -> None:
        process = await self._desk.start(self._question)
        leaving = asyncio.create_task(until_gone(receive))
        talking = asyncio.create_task(self._talk(process, send))
        try:
            await asyncio.wait({leaving, talking}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            leaving.cancel()
            talking.cancel()
            # What it asks the gateway meanwhile breaks off, and is charged for what was generated.
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await asyncio.shield(process.wait())
        with contextlib.suppress(asyncio.CancelledError, OSError):
            await talking

    async def _talk(self, process: asyncio.subprocess.Process, send: Send) -> None:
        assert process.stdout is not None
        held = b""
        last = None
        while last not in LAST:
            try:
                line = await asyncio.wait_for(process.stdout.readline(), self._gateway.keep_alive_s)
            except TimeoutError:
                await self._send(send, held + b": keep-alive\n\n")
                held = b""
                continue
            event = json.loads(line) if line else LOST
            last = event["event"]
            if last == "error" and not self._began:
                raise _refusal(event)
            # In ASCII: a model may write half of a surrogate pair.
            held += f"data: {json.dumps(event)}\n\n".encode()
            if last != "note" or self._began:
                await self._send(send, held)
                held = b""
        self._outcome = "done" if last == "answer" else "failed"
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send, piece: bytes) -> None:
        if not self._began:
            self._began = True
            raw = [(b"content-type", STREAM.encode()), (b"cache-control", b"no-cache")]
            await send({"type": "http.response.start", "status": 200, "headers": raw})
        await send({"type": "http.response.body", "body": piece, "more_body": True})


def _refusal(event: dict[str, Any]) -> ApiError:
    """An error before any step: of the request, if it names a field."""
    return ApiError(422 if event["param"] else 500, event["message"], event["param"])
