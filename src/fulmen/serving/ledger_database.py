"""The ledger's connections: what SQLite must be told, and how a database's failures reach a user."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, func, select
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError

from fulmen.errors import LedgerError

BUSY_TIMEOUT_S = 30
# Any number that no other program takes: "fulmen" in ASCII.
BOOK_LOCK = 0x66756C6D656E
READS = "fulmen_reads"
# Options of a connection that will not write: in SQLite it then waits for no writer.
READING = {READS: True}
LAZY = "fulmen_lazy"
# Of a transaction that need not wait for SQLite's disk: no kill loses it, a crash of the machine may.
UNHURRIED = {LAZY: True}


def make_engine(place: str | Path) -> Engine:
    """An engine for a SQLite file or a database URL. Raises LedgerError for a URL that cannot be."""
    try:
        engine = create_engine(_database_url(place))
    except ModuleNotFoundError as error:
        raise LedgerError(f"this ledger needs a package: pip install 'psycopg[binary]' ({error})") from error
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
    return engine


def _database_url(place: str | Path) -> URL:
    if isinstance(place, Path):
        return URL.create("sqlite", database=str(place))
    try:
        url = make_url(place)
    except (ArgumentError, ValueError):
        # Not the URL itself, nor the cause: both may hold a password.
        raise LedgerError(
            "the ledger's URL cannot be read; use postgresql://USER:PASSWORD@HOST/NAME"
        ) from None
    if url.drivername in ("sqlite", "postgresql+psycopg"):
        return url
    if url.drivername in ("postgres", "postgresql"):
        return url.set(drivername="postgresql+psycopg")
    raise LedgerError(f"a ledger in {url.drivername!r} cannot be; use sqlite:///FILE or postgresql://...")


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    """Settings of each connection: readers and one writer side by side."""
    connection.isolation_level = None  # `_begin_sqlite` begins, not the driver
    connection.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_S * 1000}")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA foreign_keys = ON")


def _begin_sqlite(connection: Connection) -> None:
    """A transaction that reads and then writes must be a writer from its start, or it may fail midway."""
    options = connection.get_execution_options()
    connection.exec_driver_sql(f"PRAGMA synchronous = {'NORMAL' if options.get(LAZY) else 'FULL'}")
    connection.exec_driver_sql("BEGIN" if options.get(READS) else "BEGIN IMMEDIATE")


def hold_book(connection: Connection) -> None:
    """Let one process at a time make the tables, to the end of this transaction; SQLite does so by itself."""
    if connection.dialect.name == "postgresql":
        connection.execute(select(func.pg_advisory_xact_lock(BOOK_LOCK)))


@contextmanager
def failures() -> Iterator[None]:
    """Turn the database's failures into LedgerError, by its first line alone: no statement, no parameter."""
    try:
        yield
    except SQLAlchemyError as error:
        cause = error.orig if isinstance(error, DBAPIError) else error
        reason = (str(cause).strip().splitlines() or [type(error).__name__])[0][:200]
        raise LedgerError(
            f"the ledger's database failed ({reason}); see that it runs and has room"
        ) from error
