"""What all routes and requests of one gateway share: the engine, the accounts, the limits, the metrics."""

import asyncio
import logging
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

import httpx

from fulmen.serving.billing.store import BillingStore
from fulmen.serving.engine.process import Engine
from fulmen.serving.engine.served_model import ServedModel
from fulmen.serving.gateway.admission.auth import Keys
from fulmen.serving.gateway.admission.concurrency import ConcurrencyLimiter
from fulmen.serving.gateway.context.managed_context import ManagedContexts
from fulmen.serving.gateway.errors import ApiError, engine_error, read_json_object
from fulmen.serving.gateway.metrics import Metrics
from fulmen.serving.gateway.schemas.grammar_check import GrammarCheck

LAST_JOBS_S = 30.0


@dataclass
class Gateway:
    """What the routes share.

    Attributes:
        keep_alive_s: seconds of silence after which a waiting client gets a sign of life.
        solvent: accounts that had money when they last asked.
    """

    model: ServedModel
    engine: Engine
    billing: BillingStore
    keep_alive_s: float = 10.0
    log: logging.Logger = field(default_factory=lambda: logging.getLogger("fulmen.gateway"))
    limiter: ConcurrencyLimiter = field(default_factory=ConcurrencyLimiter)
    metrics: Metrics = field(default_factory=Metrics)
    solvent: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.keys = Keys(self.billing.accounts)
        # No limit on connections: `limiter` is one. None on reading: an answer may be long in coming.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        timeout = httpx.Timeout(None, connect=5.0)
        transport = self.engine.transport(limits)
        self.client = httpx.AsyncClient(transport=transport, timeout=timeout, trust_env=False)
        self.grammars = GrammarCheck(self.model)
        self.contexts = ManagedContexts(self.model, self.engine.settings)
        self._kept: set[asyncio.Future[Any]] = set()

    async def ask(self, endpoint: str, body: dict[str, Any]) -> Any:
        """The engine's answer to what generates nothing and costs nothing. Raises ApiError."""
        if not self.engine.ready:
            raise ApiError(503, "the engine is starting; try again shortly")
        headers = {"authorization": f"Bearer {self.engine.settings.key}"}
        try:
            answer = await self.client.post(self.engine.url + endpoint, json=body, headers=headers)
        except httpx.HTTPError as error:
            raise ApiError(503, "the engine was lost while it answered; try again shortly") from error
        if answer.status_code != httpx.codes.OK:
            raise engine_error(answer.status_code, read_json_object(answer.content), body)
        return answer.json()

    def keep(self, work: Coroutine[Any, Any, None] | asyncio.Task[None]) -> None:
        """Let work end although nobody waits for it."""
        task = asyncio.ensure_future(work)
        self._kept.add(task)
        task.add_done_callback(self._kept.discard)

    async def close(self) -> None:
        """Wait for what is under way, then close."""
        if self._kept:
            await asyncio.wait(self._kept, timeout=LAST_JOBS_S)
        await self.grammars.close()
        self.contexts.close()
        await self.client.aclose()
