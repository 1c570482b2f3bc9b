"""The file of an index: where it lies, its tables, and a new one where it is damaged or outdated."""

import hashlib
import os
import sqlite3
from pathlib import Path

from fulmen.errors import DocumentError, unwritable

CACHE_VARIABLE = "FULMEN_CACHE"
# Another process may be reading a folder for the first time.
WAIT_S = 120.0
# first, last: the rowids of a document's passages; none for a file without text, whose remark says why.
TABLES = """
CREATE TABLE documents (path TEXT PRIMARY KEY, stamp TEXT, sha256 TEXT, characters INTEGER, lines INTEGER,
                        remark TEXT, first INTEGER, last INTEGER);
CREATE VIRTUAL TABLE passages USING fts5(path, body, first_line UNINDEXED, first_character UNINDEXED,
                                         tokenize = 'porter unicode61 remove_diacritics 2');
CREATE TABLE readers (version TEXT);
"""


def cache_folder(chosen: str | Path | None) -> Path:
    """The folder of all indexes: the one chosen, or that of the environment, or the user's cache."""
    if named := chosen or os.environ.get(CACHE_VARIABLE):
        return Path(named).expanduser().resolve()
    # Of the XDG rules: a relative path counts as none.
    common = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (common if common.is_absolute() else Path.home() / ".cache") / "fulmen"


def open_store(folder: Path, cache: str | Path | None, version: str) -> tuple[sqlite3.Connection, Path]:
    """The index of a folder, empty if it is new, damaged or was written by other readers; and its file.

    Raises DocumentError for a cache inside the folder, OutputError for one that cannot be written.
    """
    own = cache_folder(cache)
    if own.is_relative_to(folder):
        raise DocumentError(
            f"the index would lie in {own}, inside the folder that is read; "
            f"name another cache, or set {CACHE_VARIABLE}",
            arguments=["cache"],
        )
    path = own / "documents" / f"{hashlib.sha256(os.fsencode(folder)).hexdigest()[:24]}.sqlite"
    try:
        # Text of the user's documents: for the user alone.
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            return _opened(path, version), path
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError:  # no database, or a damaged one: it is only a cache
            for damaged in path.parent.glob(f"{path.name}*"):
                damaged.unlink()
            return _opened(path, version), path
    except (OSError, sqlite3.Error) as error:
        raise unwritable(path, error) from error


def _opened(path: Path, version: str) -> sqlite3.Connection:
    store = sqlite3.connect(path, timeout=WAIT_S, isolation_level=None, check_same_thread=False)
    try:
        store.execute("PRAGMA journal_mode = WAL")
        store.execute("BEGIN IMMEDIATE")
        if not _is_of(store, version):
            _make_anew(store, version)
        store.execute("COMMIT")
    except BaseException:
        store.close()
        raise
    return store


def _is_of(store: sqlite3.Connection, version: str) -> bool:
    tables = {name for (name,) in store.execute("SELECT name FROM sqlite_master")}
    if not {"documents", "passages", "readers"} <= tables:
        return False
    return bool(store.execute("SELECT version FROM readers").fetchone() == (version,))


def _make_anew(store: sqlite3.Connection, version: str) -> None:
    for name in ("documents", "passages", "readers"):
        store.execute(f"DROP TABLE IF EXISTS {name}")
    for statement in filter(str.strip, TABLES.split(";")):
        store.execute(statement)
    store.execute("INSERT INTO readers VALUES (?)", (version,))
