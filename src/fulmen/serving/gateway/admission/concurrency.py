"""How many requests may be under way at once: per account and in all."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from fulmen.serving.billing.accounts import Account
from fulmen.serving.gateway.errors import ApiError

MAX_OPEN = 1024


class ConcurrencyLimiter:
    """Requests under way."""

    def __init__(self, most: int = MAX_OPEN) -> None:
        self._most = most
        self._open: Counter[str] = Counter()

    def __len__(self) -> int:
        return self._open.total()

    @contextmanager
    def hold(self, account: Account) -> Iterator[None]:
        """One more for the account until the end of the block. Raises ApiError 429, or 503 if all is full."""
        if account.concurrency is not None and self._open[account.id] >= account.concurrency:
            most = f"{account.concurrency} requests of this key are under way, its limit"
            raise ApiError(429, f"{most}; wait for one to end")
        if len(self) >= self._most:
            raise ApiError(503, f"{self._most} requests are under way, the server's limit; try again shortly")
        self._open[account.id] += 1
        try:
            yield
        finally:
            self._open[account.id] -= 1
