"""The ledger's connections: what SQLite must be told, and how a database's failures reach a user."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, func, select
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError

from fulmen.errors import LedgerError, first_line

BUSY_TIMEOUT_S = 30
# Any number that no other program takes: "fulmen" in ASCII.
BOOK_LOCK = 0x66756C6D656E
READS = "fulmen_reads"
# Options of a connection that will not write: in SQLite it then waits for no writer.
READING = {READS: True}
LAZY = "fulmen_lazy"
# What SQLite writes beside a file, with the file's mode.
_BESIDE = ("-wal", "-shm", "-journal")
# SQLite's names of what no second try gets over: another kind of file, a damaged one, another's tables.
_NO_LEDGER = ("SQLITE_NOTADB", "SQLITE_CORRUPT", "SQLITE_ERROR", "SQLITE_SCHEMA")
# Of a transaction that need not wait for SQLite's disk: no kill loses it, a crash of the machine may.
UNHURRIED = {LAZY: True}


def make_engine(place: str | Path) -> Engine:
    """An engine for a SQLite file or a database URL. Raises LedgerError for a URL that cannot be."""
    try:
        engine = create_engine(_database_url(place))
    except ModuleNotFoundError as error:
        raise LedgerError(f"this ledger needs a package: pip install 'psycopg[binary]' ({error})") from error
    if engine.dialect.name == "sqlite":
        if (file := _file_of(engine)) is not None:
            # What SQLite makes itself, everybody may read. If this fails, SQLite says better why.
            with suppress(OSError):
                os.close(os.open(file, os.O_RDWR | os.O_CREAT, 0o600))
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


def keep_private(engine: Engine) -> None:
    """Let the owner alone read a SQLite file and what lies beside it, as the key file."""
    file = _file_of(engine)
    for part in () if file is None else (file, *(file.with_name(file.name + end) for end in _BESIDE)):
        with suppress(OSError):  # gone meanwhile, or another user's
            if part.stat().st_mode & 0o077:
                part.chmod(0o600)


def _file_of(engine: Engine) -> Path | None:
    file = engine.url.database
    return Path(file) if engine.dialect.name == "sqlite" and file and file != ":memory:" else None


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
def failures(url: URL) -> Iterator[None]:
    """Turn the database's failures into LedgerError, by its first line alone: no statement, no parameter.

    A file is named; a URL is not, as it may hold a password.
    """
    try:
        yield
    except SQLAlchemyError as error:
        cause = error.orig if isinstance(error, DBAPIError) else error
        reason = first_line(cause or error)
        raise LedgerError(_explain(url, cause, reason)) from error


def _explain(url: URL, cause: object, reason: str) -> str:
    if url.get_backend_name() != "sqlite":
        return f"the ledger's database failed ({reason}); see that it runs and has room"
    if getattr(cause, "sqlite_errorname", "").startswith(_NO_LEDGER):
        said = f"{url.database} is no ledger, or is damaged ({reason})"
        return f"the ledger's database failed: {said}; restore it, or move it away, and a new one is made"
    said = f"{url.database} cannot be used ({reason})"
    return f"the ledger's database failed: {said}; make it readable and writable, with room on its disk"
