"""The book of requests and money, in SQLite or PostgreSQL: every request is charged once, whatever crashes.

A request is written down at its start (`begin`, with the rates it will be charged by), its usage while it
streams (`progress`), its charge at the end (`settle`). The charge, the row's state and the
account's balance change in one transaction, on the condition that the row is open: a second `settle` finds
it settled and returns the charge that was made. What a crash leaves open, `recover` charges by its last known
usage. So that nothing goes uncharged, call `begin` before anything is sent, `progress` before its tokens are,
and `settle` before the last of them. Those two wait for the disk and take with them what `begin` wrote, which
does not wait: by itself it charges nothing.

An account without any deposit has no limit. With one, `begin` asks for a balance above zero; requests under
way may take it below. The balance is deposits minus charges, those from before the first deposit too.

Amounts are whole numbers of UNIT (1e-9 of the currency), times are milliseconds since 1970 in UTC.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import Connection, Row, insert, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import IntegrityError

from fulmen.errors import InsufficientBalance, LedgerError
from fulmen.serving.billing.ledger_database import (
    READING,
    UNHURRIED,
    failures,
    hold_book,
    keep_private,
    make_engine,
)
from fulmen.serving.billing.ledger_tables import VERSION, accounts, book, deposits, metadata, requests
from fulmen.serving.billing.prices import PriceTable, Rates, Tokens, from_units, money_text, to_units

ROWS_AT_ONCE = 1000


class AttentionReads(NamedTuple):
    """What attention read for one request: tokens if dense, with DSA (mean over layers), bytes saved."""

    context_tokens: int
    tokens_read: int
    bytes_saved: int


class Usage(NamedTuple):
    """One request in the book; None is what is not known, or not yet."""

    request_id: str
    account: str
    model: str
    endpoint: str
    begun: datetime
    settled: datetime | None
    state: str
    outcome: str | None
    prompt_hit: int
    prompt_miss: int
    output: int
    rate_hit: Decimal
    rate_miss: Decimal
    rate_output: Decimal
    charge: Decimal | None
    currency: str
    context_tokens: int | None
    tokens_read: int | None
    bytes_saved: int | None


class Ledger:
    """The book in a database; made if it is not there. For any number of threads and processes.

    Args:
        place: a file for SQLite, or a URL as SQLAlchemy writes it: "postgresql://user:password@host/name".
        prices: what requests that begin now are charged by, and the book's currency.
        server: who writes; `recover` touches only requests that the same server began.

    Every method is one transaction and raises LedgerError if the database fails.
    """

    def __init__(self, place: str | Path, prices: PriceTable, server: str = "") -> None:
        self.prices = prices
        self._server = server
        self._engine = make_engine(place)
        # SQLite has one writer at a time; threads that queue here do not poll its lock.
        self._turn: AbstractContextManager[Any] = (
            threading.RLock() if self._engine.dialect.name == "sqlite" else nullcontext()
        )
        self._open_book()
        keep_private(self._engine)

    def begin(self, request_id: str, account_id: str, model: str, endpoint: str) -> None:
        """Write a request down, open. Raises InsufficientBalance, or LedgerError for an id used before."""
        rates = self.prices.rates
        with self._writing(UNHURRIED) as connection:
            account = _account(connection, account_id)
            if account.prepaid and account.balance <= 0:
                raise InsufficientBalance(
                    f"the balance of {account_id} is {money_text(from_units(account.balance))} "
                    f"{self.prices.currency}; top it up: fulmen keys topup {account_id} AMOUNT"
                )
            row = {"id": request_id, "account": account_id, "server": self._server, "begun_ms": _now_ms()}
            row |= {"model": model, "endpoint": endpoint, "state": "open"}
            row |= {f"rate_{kind}": money_text(rate) for kind, rate in rates._asdict().items()}
            try:
                connection.execute(insert(requests).values(row))
            except IntegrityError as error:
                raise LedgerError(f"request {request_id} is in the ledger already; use a new id") from error

    def progress(self, request_id: str, tokens: Tokens) -> None:
        """Note the usage so far, for `recover`. Changes nothing once the request is settled."""
        with self._writing() as connection:
            connection.execute(_update_open(request_id).values(**tokens._asdict()))

    def settle(
        self, request_id: str, tokens: Tokens, outcome: str, reads: AttentionReads | None = None
    ) -> Decimal:
        """Charge a request and return the charge; of a settled one, change nothing and return its charge.

        Raises LedgerError for a request that never began.
        """
        with self._writing() as connection:
            return self._settle(connection, request_id, tokens, outcome, reads)

    def recover(self) -> int:
        """Charge what this server left open by its last known usage, outcome "crashed"; return how many.

        Call it at start, before the first request.
        """
        left = select(requests).where(requests.c.state == "open", requests.c.server == self._server)
        with self._writing() as connection:
            # PostgreSQL may still be committing what a killed server sent last: wait for that.
            rows = connection.execute(left.with_for_update()).all()
            for row in rows:
                self._settle(connection, row.id, Tokens(row.hit, row.miss, row.output), "crashed", None)
        return len(rows)

    def balance(self, account_id: str) -> Decimal | None:
        """Deposits minus charges; None without any deposit: no limit."""
        query = select(accounts.c.balance).where(accounts.c.id == account_id, accounts.c.prepaid)
        with self._reading() as connection:
            units = connection.execute(query).scalar_one_or_none()
        return None if units is None else from_units(units)

    def deposit(self, account_id: str, amount: Decimal, note: str) -> None:
        """Add to an account's balance; from the first deposit on, even one of 0, the account has a limit.

        Raises ConfigError for an amount below 0, too large, or with more than nine decimals.
        """
        units = to_units(amount)
        row = {"account": account_id, "amount": units, "note": note, "made_ms": _now_ms()}
        with self._writing() as connection:
            _account(connection, account_id)
            connection.execute(insert(deposits).values(row))
            _add(connection, account_id, units, prepaid=True)

    def rows(
        self, account_id: str | None = None, since: datetime | None = None, until: datetime | None = None
    ) -> Iterator[Usage]:
        """Requests by the time they began, from `since` (included) to `until` (not included)."""
        query = select(requests).order_by(requests.c.begun_ms, requests.c.id)
        if account_id is not None:
            query = query.where(requests.c.account == account_id)
        if since is not None:
            query = query.where(requests.c.begun_ms >= _ms(since))
        if until is not None:
            query = query.where(requests.c.begun_ms < _ms(until))
        with self._reading() as connection:
            for row in connection.execution_options(yield_per=ROWS_AT_ONCE).execute(query):
                yield self._usage(row)

    def close(self) -> None:
        """Close the connections."""
        self._engine.dispose()

    def _settle(
        self,
        connection: Connection,
        request_id: str,
        tokens: Tokens,
        outcome: str,
        reads: AttentionReads | None,
    ) -> Decimal:
        row = connection.execute(select(requests).where(requests.c.id == request_id)).one_or_none()
        if row is None:
            raise LedgerError(f"request {request_id} is not in the ledger; begin it first")
        charge = Rates(*map(Decimal, (row.rate_hit, row.rate_miss, row.rate_output))).cost(tokens)
        settled = tokens._asdict() | ({} if reads is None else reads._asdict())
        settled |= {"state": "settled", "settled_ms": _now_ms(), "outcome": outcome}
        settled["charge"] = to_units(charge)
        # The condition makes the charge unique: of two that try, the database lets one find the row open.
        if connection.execute(_update_open(request_id).values(settled)).rowcount:
            _add(connection, row.account, -to_units(charge))
            return charge
        made = select(requests.c.charge).where(requests.c.id == request_id)
        return from_units(connection.execute(made).scalar_one())

    def _usage(self, row: Row[Any]) -> Usage:
        return Usage(
            request_id=row.id,
            account=row.account,
            model=row.model,
            endpoint=row.endpoint,
            begun=_time(row.begun_ms),
            settled=None if row.settled_ms is None else _time(row.settled_ms),
            state=row.state,
            outcome=row.outcome,
            prompt_hit=row.hit,
            prompt_miss=row.miss,
            output=row.output,
            rate_hit=Decimal(row.rate_hit),
            rate_miss=Decimal(row.rate_miss),
            rate_output=Decimal(row.rate_output),
            charge=None if row.charge is None else from_units(row.charge),
            currency=self.prices.currency,
            context_tokens=row.context_tokens,
            tokens_read=row.tokens_read,
            bytes_saved=row.bytes_saved,
        )

    def _open_book(self) -> None:
        """Make the tables, or see that those found are of this version and currency."""
        with self._writing() as connection:
            hold_book(connection)
            metadata.create_all(connection)
            found = connection.execute(select(book)).one_or_none()
            if found is None:
                connection.execute(insert(book).values(id=1, version=VERSION, currency=self.prices.currency))
                return
        if found.version != VERSION:
            raise LedgerError(
                f"the ledger has version {found.version}, this program needs {VERSION}; use a new ledger"
            )
        if found.currency != self.prices.currency:
            raise LedgerError(
                f"the ledger is in {found.currency}, the price table in {self.prices.currency}; "
                "use that currency, or a new ledger"
            )

    @contextmanager
    def _writing(self, options: dict[str, bool] | None = None) -> Iterator[Connection]:
        with (
            self._turn,
            failures(self._engine.url),
            self._engine.execution_options(**(options or {})).begin() as connection,
        ):
            yield connection

    @contextmanager
    def _reading(self) -> Iterator[Connection]:
        """One snapshot; writers go on meanwhile."""
        with failures(self._engine.url), self._engine.connect() as connection:
            yield connection.execution_options(**READING)


def _account(connection: Connection, account_id: str) -> Row[Any]:
    """The account's row, made if it is not there."""
    dialect = sqlite if connection.dialect.name == "sqlite" else postgresql
    new = dialect.insert(accounts).values(id=account_id, balance=0, prepaid=False)
    connection.execute(new.on_conflict_do_nothing())
    return connection.execute(select(accounts).where(accounts.c.id == account_id)).one()


def _add(connection: Connection, account_id: str, units: int, **changes: bool) -> None:
    change = update(accounts).where(accounts.c.id == account_id)
    connection.execute(change.values(balance=accounts.c.balance + units, **changes))


def _update_open(request_id: str) -> Any:
    return update(requests).where(requests.c.id == request_id, requests.c.state == "open")


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _ms(moment: datetime) -> int:
    return int(moment.timestamp() * 1000)


def _time(ms: int) -> datetime:
    return datetime.fromtimestamp(ms / 1000, UTC)
