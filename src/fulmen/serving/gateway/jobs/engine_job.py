"""One request at the engine, from the ledger's first word to its last; it lives on when its client is gone.

Written down before any of the answer leaves, charged before the end of it does. The engine is asked
meanwhile; for an account that may be out of money, after the ledger said that it is not. A client that leaves
makes the job end the request at the engine and read on to the usage with which the engine closes it, so that
what was generated until then is charged exactly.
"""

import asyncio
import json
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

from fulmen.errors import FulmenError, InsufficientBalance
from fulmen.serving.billing.accounts import Account
from fulmen.serving.billing.prices import Tokens
from fulmen.serving.gateway.dialects.base import Cleaner, Dialect, Event, events_of
from fulmen.serving.gateway.errors import ApiError, engine_error, read_json_object
from fulmen.serving.gateway.gateway import Gateway
from fulmen.serving.gateway.jobs.attention_reads import count_attention_reads
from fulmen.serving.gateway.schemas.forced_calls import enforced_schemas
from fulmen.serving.gateway.usage import bill_for_client

# How often a stream's usage is written down, for a crash of the gateway itself; all streams together write
# no more than so many notes a second, each of which waits for the disk.
PROGRESS_S, NOTES_PER_S = 0.5, 100
ABORT_RETRY_S, ABORT_TRIES = 0.5, 20


@dataclass(frozen=True)
class EngineRequest:
    """What to ask the engine, and how its answer is read.

    Attributes:
        endpoint: its path there.
        body: of the request.
        account: who pays.
        dialect: how the answer is read; new for each request.
        id_prefix, id_suffixes: around our id, the engine's own names of the request.
        explain: puts what the engine refuses into the words of the API that was asked.
        cleaner: rewrites the engine's answer before the dialect reads it.
        assembled: the client gets one piece, which the dialect makes of the engine's stream.
        notes: what the bill says besides.
    """

    endpoint: str
    body: dict[str, Any]
    account: Account
    dialect: Dialect
    id_prefix: str = "chatcmpl-"
    id_suffixes: tuple[str, ...] = ("",)
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    explain: Callable[[ApiError], ApiError] = lambda error: error
    cleaner: Cleaner | None = None
    assembled: bool = False
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def engine_streams(self) -> bool:
        """Whether the engine's answer comes in pieces."""
        return bool(self.body.get("stream"))

    @property
    def streams(self) -> bool:
        """Whether the client's answer comes in pieces."""
        return self.engine_streams and not self.assembled


class EngineJob:
    """Runs a request; `pieces` brings bytes for the client, or an ApiError, and None at the end.

    Attributes:
        admitted: whether nothing of the request itself speaks against asking the engine.
        asked_at, first_at: when the engine was asked, and when it began to answer.
    """

    def __init__(self, gateway: Gateway, request: EngineRequest) -> None:
        self.pieces: asyncio.Queue[bytes | ApiError | None] = asyncio.Queue()
        self.admitted, self.asked_at, self.first_at = False, 0.0, 0.0
        self._gateway, self._request, self._dialect = gateway, request, request.dialect
        self._begun = self._dropped = self._settled = False
        self._noted_at = 0.0
        self._written: asyncio.Task[None]
        self.task = asyncio.create_task(self._run())

    def drop(self) -> None:
        """The client is gone."""
        if not self.task.done() and not self._dropped:
            self._dropped = True
            if self.admitted:
                self._gateway.keep(self._abort())
            else:
                self.task.cancel()

    async def _run(self) -> None:
        outcome = "failed"
        try:
            outcome = await self._ask()
        except ApiError as error:
            outcome = "refused" if error.status < 500 else "failed"
            await self._fail(error, outcome)
        except (httpx.HTTPError, asyncio.CancelledError) as error:
            outcome = "dropped" if self._dropped else "engine lost"
            await self._fail(
                ApiError(503, "the engine was lost while it answered; try again shortly"), outcome
            )
            if isinstance(error, asyncio.CancelledError) and not self._dropped:
                raise
        except Exception:
            self._gateway.log.exception("request %s failed", self._request.id)
            await self._fail(ApiError(500, "the server failed on this request; its log says why"), outcome)
        finally:
            self._gateway.metrics.ended(self._request.endpoint, outcome)
            self.pieces.put_nowait(None)

    async def _ask(self) -> str:
        """Write the request down, ask the engine, hand on its answer; return how it ended."""
        if not self._gateway.engine.ready:
            raise ApiError(503, "the engine is starting; try again shortly")
        if schemas := enforced_schemas(self._request.body):
            try:
                await self._gateway.grammars.check(self._request.account.id, schemas)
            except ApiError as error:
                raise self._request.explain(error) from error
        self.admitted = True
        self._written = asyncio.create_task(self._begin())
        try:
            if self._request.account.id not in self._gateway.solvent:
                await asyncio.shield(self._written)
            await self._answer()
        finally:
            # Whatever happened: what got into the ledger must be settled.
            await asyncio.wait([self._written])
        return "dropped" if self._dropped else "done"

    async def _answer(self) -> None:
        request, gateway = self._request, self._gateway
        http_request = gateway.client.build_request(
            "POST",
            gateway.engine.url + request.endpoint,
            json=request.body,
            headers={"x-request-id": request.id, "authorization": f"Bearer {gateway.engine.settings.key}"},
        )
        self.asked_at = time.perf_counter()
        answer = await gateway.client.send(http_request, stream=True)
        try:
            if answer.status_code != httpx.codes.OK:
                said = read_json_object(await answer.aread())
                raise request.explain(engine_error(answer.status_code, said, request.body))
            await (self._stream(answer) if request.engine_streams else self._plain(answer))
        finally:
            await answer.aclose()

    async def _begin(self) -> None:
        request, gateway = self._request, self._gateway
        try:
            begin = gateway.billing.ledger.begin
            await asyncio.to_thread(
                begin, request.id, request.account.id, gateway.model.name, request.endpoint
            )
        except InsufficientBalance as error:
            gateway.solvent.discard(request.account.id)
            raise ApiError(402, str(error)) from error
        gateway.solvent.add(request.account.id)
        self._begun, self._noted_at = True, time.monotonic()

    async def _stream(self, answer: httpx.Response) -> None:
        async for event in events_of(answer.aiter_raw()):
            piece = b"".join(map(self._dialect.feed, self._cleaned(event)))
            if not self.first_at:
                await self._came()
            if piece:
                self.pieces.put_nowait(piece)
            if self._dialect.usage.output and self._note_is_due():
                await self._note()
        if self._dialect.usage.cached is None:
            raise httpx.ReadError("the stream ended without its usage")
        bill = await self._settle("dropped" if self._dropped else "done")
        self.pieces.put_nowait(self._dialect.tail(bill))

    async def _plain(self, answer: httpx.Response) -> None:
        body = read_json_object(await answer.aread())
        await self._came()
        if self._request.cleaner:
            self._request.cleaner.answer(body)
        self._dialect.read_plain(body)
        bill = await self._settle("dropped" if self._dropped else "done")
        self.pieces.put_nowait(_dump(self._dialect.plain(body, bill)))

    def _cleaned(self, event: Event) -> list[Event]:
        return self._request.cleaner.event(event) if self._request.cleaner else [event]

    async def _came(self) -> None:
        """The engine has begun to answer: go on when the request is written down."""
        self.first_at = time.perf_counter()
        await asyncio.shield(self._written)

    def _note_is_due(self) -> bool:
        every = max(PROGRESS_S, len(self._gateway.limiter) / NOTES_PER_S)
        return time.monotonic() - self._noted_at > every

    async def _note(self) -> None:
        ledger, tokens = self._gateway.billing.ledger, self._dialect.usage.tokens
        await asyncio.to_thread(ledger.progress, self._request.id, tokens)
        self._noted_at = time.monotonic()

    async def _settle(self, outcome: str) -> dict[str, Any]:
        """Charge for what was generated (no token: nothing) and return the bill to show."""
        gateway, tokens = self._gateway, self._dialect.usage.tokens
        if not tokens.output and outcome != "done":
            tokens = Tokens(0, 0, 0)
        reads = count_attention_reads(gateway.model, tokens)
        charge = await asyncio.to_thread(
            gateway.billing.ledger.settle, self._request.id, tokens, outcome, reads
        )
        self._settled = True
        gateway.metrics.billed(tokens, float(charge), gateway.billing.prices.currency, reads)
        return bill_for_client(gateway.billing.prices, tokens, charge, reads) | self._request.notes

    async def _fail(self, error: ApiError, outcome: str) -> None:
        """Charge for what the client got, and tell it what went wrong."""
        if self._begun and not self._settled:
            try:
                await self._settle(outcome)
            except FulmenError:
                # Left open in the ledger: `recover` charges for it.
                self._gateway.log.exception("request %s could not be settled", self._request.id)
        self.pieces.put_nowait(error)

    async def _abort(self) -> None:
        """End the request at the engine; it may not have got there yet."""
        request, gateway = self._request, self._gateway
        names = [f"{request.id_prefix}{request.id}{suffix}" for suffix in request.id_suffixes]
        for _ in range(ABORT_TRIES):
            try:
                await gateway.client.post(
                    f"{gateway.engine.url}/inference/v1/abort_requests",
                    json={"request_ids": names},
                    headers={"authorization": f"Bearer {gateway.engine.settings.key}"},
                    timeout=ABORT_RETRY_S * 4,
                )
            except httpx.HTTPError as error:
                gateway.log.info("request %s: no answer to its end (%s)", request.id, error)
            if await asyncio.wait([self.task], timeout=ABORT_RETRY_S) and self.task.done():
                return
        self.task.cancel()


def _dump(body: dict[str, Any]) -> bytes:
    return json.dumps(body, ensure_ascii=False).encode()
