"""An index of a folder's documents: their text in passages, found by words with SQLite's FTS5 (BM25).

It is one file in the user's cache folder, never in the folder of documents, and may be deleted at any time. A
refresh reads anew what changed alone: a file whose size and times are the same is not opened, one whose bytes
are the same is not taken apart again.
"""

import hashlib
import re
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from fulmen.agents.documents.folder import FolderFile, PassedOver, require_folder, walk
from fulmen.agents.documents.passages import PassageSpan, passages_of
from fulmen.agents.documents.reader import TextReader, Unreadable, contents, readers_version
from fulmen.agents.documents.store import open_store
from fulmen.errors import DocumentError

MAX_FILES = 20_000
MAX_CHARACTERS = 256 * 2**20
SEARCH_LIMIT_S = 5.0
MAX_QUERY = 1000
# A file that changed so shortly before it was read may change again without a trace in its times.
SETTLED_NS = 2 * 10**9
# Instructions of SQLite's machine between two looks at the clock.
LOOK_EVERY = 20_000


class Document(NamedTuple):
    """A document's facts. path: in the folder, with `/`. remark: as on bad UTF-8, or nothing."""

    path: str
    characters: int
    lines: int
    remark: str


class Found(NamedTuple):
    """A passage that a search found: which document it is in, its text, and where that is."""

    path: str
    text: str
    span: PassageSpan


class DocumentIndex:
    """The documents of a folder, as they were at the last `refresh`. Safe to use from several threads.

    Args:
        folder: what to read; hidden files and symbolic links in it are passed over.
        cache: folder of indexes; None: $FULMEN_CACHE, else $XDG_CACHE_HOME/fulmen, else ~/.cache/fulmen.

    Raises:
        DocumentError: no such folder, or a cache inside it.
        OutputError: the cache cannot be written.
    """

    def __init__(self, folder: str | Path, cache: str | Path | None = None) -> None:
        self.folder = require_folder(folder)
        self._lock = threading.RLock()
        self._reader = TextReader()
        self._passed_over: list[PassedOver] = []
        self._store, self.path = open_store(self.folder, cache, readers_version())
        self._store.create_function("fits", 2, lambda path, glob: fnmatchcase(path, glob))

    def close(self) -> None:
        """Close the index's file and end the worker."""
        with self._lock:
            self._reader.close()
            self._store.close()

    def refresh(self) -> None:
        """Make the index that of the folder as it is now.

        Raises DocumentError if there are more than 20,000 files or 256 Mi characters, or no folder any more.
        """
        with self._transaction():
            known = dict(self._store.execute("SELECT path, stamp FROM documents"))
            self._passed_over, seen = [], set()
            for entry in walk(self.folder):
                if isinstance(entry, PassedOver):
                    self._passed_over.append(entry)
                    continue
                seen.add(entry.path)
                if len(seen) > MAX_FILES:
                    raise DocumentError(
                        f"{self.folder} has more than {MAX_FILES:,} files; name a smaller folder"
                    )
                if known.get(entry.path) != _stamp(entry):
                    self._update(entry)
            for path in known.keys() - seen:
                self._forget(path)
            self._require_bearable()

    def documents(self, glob: str = "*") -> list[Document]:
        """The documents whose path fits a pattern (`*` stands for slashes, too), by path."""
        with self._lock:
            rows = self._store.execute(
                "SELECT path, characters, lines, remark FROM documents"
                " WHERE first IS NOT NULL AND fits(path, ?) ORDER BY path",
                (glob or "*",),
            )
            return [Document(*row) for row in rows]

    def passed_over(self) -> list[PassedOver]:
        """What is in the folder and is no document: binary, hidden, too large, unreadable and so on."""
        with self._lock:
            rows = self._store.execute("SELECT path, remark FROM documents WHERE first IS NULL")
            return sorted([*self._passed_over, *(PassedOver(*row) for row in rows)], key=lambda one: one.path)

    def text(self, path: str) -> str:
        """A document's text. Raises DocumentError if there is none of that path; nothing else is opened."""
        with self._lock:
            row = self._store.execute(
                "SELECT first, last, remark FROM documents WHERE path = ?", (path,)
            ).fetchone()
            if row is None or row[0] is None:
                raise DocumentError(f"path={path!r} {_reason_against(path, row)}; list names all documents")
            bodies = self._store.execute(
                "SELECT body FROM passages WHERE rowid BETWEEN ? AND ? ORDER BY rowid", row[:2]
            )
            return "".join(body for (body,) in bodies)

    def search(self, query: str, glob: str = "*", limit: int = 8) -> list[Found]:
        """The passages that have most of a query's words, best first.

        Raises DocumentError for a query without words, one too long, or a search of more than 5 s.
        """
        words = re.findall(r"\w+", query)
        if not words or len(query) > MAX_QUERY:
            raise DocumentError(
                f"query={query[:80]!r} cannot be; write words, up to {MAX_QUERY:,} characters"
            )
        # Quoted, nothing in a query is FTS5's own language.
        match = " OR ".join(f'"{word}"' for word in dict.fromkeys(words))
        with self._lock, self._timed():
            rows = self._store.execute(
                "SELECT path, body, first_line, first_character FROM passages WHERE passages MATCH ?"
                " AND fits(path, ?) ORDER BY bm25(passages), rowid LIMIT ?",
                (match, glob or "*", limit),
            ).fetchall()
        return [Found(path, body, PassageSpan.of(body, line, place)) for path, body, line, place in rows]

    def _update(self, file: FolderFile) -> None:
        digest = ""
        try:
            content = contents(file)
            digest = hashlib.sha256(content).hexdigest()
            if self._is_known(file, digest):
                return
            text, remark = self._reader.read(file.path, content)
            if not text.strip():
                raise Unreadable("empty")
        except Unreadable as reason:
            text, remark = "", str(reason)
        self._forget(file.path)
        self._insert(file, digest, text, remark)

    def _is_known(self, file: FolderFile, digest: str) -> bool:
        """Whether the same bytes were taken apart before: then only the stamp is new."""
        changed = self._store.execute(
            "UPDATE documents SET stamp = ? WHERE path = ? AND sha256 = ?",
            (_stamp_to_trust(file), file.path, digest),
        )
        return changed.rowcount > 0

    def _insert(self, file: FolderFile, digest: str, text: str, remark: str) -> None:
        (last,) = self._store.execute("SELECT coalesce(max(last), 0) FROM documents").fetchone()
        rows = [
            (number, file.path, body, span.first_line, span.first_character)
            for number, (body, span) in enumerate(passages_of(text), last + 1)
        ]
        self._store.executemany(
            "INSERT INTO passages (rowid, path, body, first_line, first_character) VALUES (?, ?, ?, ?, ?)",
            rows,
        )
        first, last = (last + 1, last + len(rows)) if rows else (None, None)
        lines = text.count("\n") + (not text.endswith("\n"))
        self._store.execute(
            "INSERT INTO documents (path, stamp, sha256, characters, lines, remark, first, last)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (file.path, _stamp_to_trust(file), digest, len(text), lines, remark, first, last),
        )

    def _forget(self, path: str) -> None:
        row = self._store.execute("SELECT first, last FROM documents WHERE path = ?", (path,)).fetchone()
        if row:
            self._store.execute("DELETE FROM passages WHERE rowid BETWEEN ? AND ?", row)
            self._store.execute("DELETE FROM documents WHERE path = ?", (path,))

    def _require_bearable(self) -> None:
        (size,) = self._store.execute("SELECT coalesce(sum(characters), 0) FROM documents").fetchone()
        if size > MAX_CHARACTERS:
            raise DocumentError(
                f"{self.folder} has {size:,} characters of text, more than {MAX_CHARACTERS:,}; "
                "name a smaller folder"
            )

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """All of a refresh or nothing of it."""
        with self._lock:
            try:
                self._store.execute("BEGIN IMMEDIATE")
                try:
                    yield
                except BaseException:
                    self._store.execute("ROLLBACK")
                    raise
                self._store.execute("COMMIT")
            except OSError as error:
                raise DocumentError(f"{self.folder} cannot be read any more ({error.strerror})") from error
            except sqlite3.Error as error:
                raise DocumentError(
                    f"the index {self.path} cannot be written ({error}); delete it, or make room"
                ) from error

    @contextmanager
    def _timed(self) -> Iterator[None]:
        """Ends a search that takes too long."""
        ends = time.monotonic() + SEARCH_LIMIT_S
        self._store.set_progress_handler(lambda: time.monotonic() > ends, LOOK_EVERY)
        try:
            yield
        except sqlite3.OperationalError as error:
            raise DocumentError(
                f"the search was ended ({error}) after at most {SEARCH_LIMIT_S:g} s; use fewer words"
            ) from error
        finally:
            self._store.set_progress_handler(None, 0)


def _stamp(file: FolderFile) -> str:
    status = file.status
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}"


def _stamp_to_trust(file: FolderFile) -> str:
    """The stamp, or none for a file that has just changed: it is looked at again."""
    return _stamp(file) if time.time_ns() - file.status.st_mtime_ns > SETTLED_NS else ""


def _reason_against(path: str, row: tuple[object, object, str] | None) -> str:
    if row is not None:
        return f"has no text ({row[2]})"
    is_outside = path.startswith(("/", "~")) or ".." in path.split("/")
    return "lies outside the folder" if is_outside else "is none of the documents"
