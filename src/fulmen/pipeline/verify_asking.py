"""Many requests to a writer, some at a time; replies are kept as they come, so that a run can go on."""

import json
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from fulmen.errors import EndpointError, OutputError, ResumeError, unwritable
from fulmen.files import write_file
from fulmen.pipeline.reporter import Reporter
from fulmen.pipeline.verify_writers import Drawing, Messages, Writer


class Request(NamedTuple):
    """What is asked. number: of this reply among those to the same messages."""

    messages: Messages
    number: int = 0


class ReplyJournal:
    """Replies in a file, one JSON line each, found by what was asked: another question is another line.

    A last line that a crash cut short is dropped. Without a path nothing is kept for later.

    Raises ResumeError for a file of something else, OutputError for one that cannot be written.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._replies: dict[str, str] = {}
        self._lock = threading.Lock()
        if path is not None:
            self._open(path)

    def __len__(self) -> int:
        return len(self._replies)

    def find(self, key: str) -> str | None:
        """The reply to what has this key, if there is one."""
        return self._replies.get(key)

    def keep(self, key: str, reply: str) -> None:
        """Add a reply. Raises OutputError."""
        line = json.dumps({"key": key, "reply": reply})
        with self._lock:
            try:
                if self.path is not None:
                    with self.path.open("a", encoding="utf-8") as file:
                        file.write(f"{line}\n")
            except OSError as error:
                raise unwritable(self.path, error) from error
            self._replies[key] = reply

    def _open(self, path: Path) -> None:
        try:
            *lines, _ = path.read_text(encoding="utf-8").split("\n") if path.exists() else [""]
            self._replies = {row["key"]: row["reply"] for row in map(json.loads, lines)}
            write_file(path, "".join(f"{line}\n" for line in lines))
        except OSError as error:
            raise OutputError(f"{path} cannot be read ({error.strerror}); name another out") from error
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, OutputError):
                raise
            raise ResumeError(
                f"{path} holds no replies of fulmen; remove it or name another out", arguments=["out"]
            ) from error


class Asking:
    """Asks a writer, several requests at a time."""

    def __init__(
        self,
        writer: Writer,
        journal: ReplyJournal,
        reporter: Reporter,
        *,
        concurrency: int,
        max_new_tokens: int,
        temperature: float,
    ) -> None:
        self._writer, self._journal, self._reporter = writer, journal, reporter
        self._concurrency = concurrency
        self._max_new_tokens, self._temperature = max_new_tokens, temperature

    def all(self, stage: str, requests: Sequence[Request]) -> list[str]:
        """The replies, in the order of the requests; those of earlier runs are not asked for again.

        Raises EndpointError if the writer fails; what it wrote before is kept.
        """
        keys = [self._key(request) for request in requests]
        waiting = {
            key: request
            for key, request in zip(keys, requests, strict=True)
            if self._journal.find(key) is None
        }
        with self._reporter.stage(stage):
            self._reporter.advance(0, len(waiting))
            self._ask(waiting)
        return [self._journal.find(key) or "" for key in keys]

    def _ask(self, waiting: dict[str, Request]) -> None:
        with ThreadPoolExecutor(self._concurrency) as pool:
            asked = {
                pool.submit(self._writer.write, request.messages, self._drawing(request)): key
                for key, request in waiting.items()
            }
            try:
                for done, future in enumerate(as_completed(asked), 1):
                    self._journal.keep(asked[future], future.result())
                    self._reporter.advance(done, len(waiting))
            except EndpointError as error:
                pool.shutdown(cancel_futures=True)
                raise self._unfinished(error, asked) from error
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _unfinished(self, error: EndpointError, asked: "dict[Future[str], str]") -> EndpointError:
        """Keep what came meanwhile, and say how to go on."""
        for future, key in asked.items():
            if not future.cancelled() and future.exception() is None:
                self._journal.keep(key, future.result())
        if self._journal.path is None:
            return error
        return EndpointError(
            f"{error}; {len(self._journal):,} replies are kept in {self._journal.path}: "
            "run the same again to go on",
            arguments=error.arguments,
        )

    def _drawing(self, request: Request) -> Drawing:
        return Drawing(self._max_new_tokens, self._temperature, request.number)

    def _key(self, request: Request) -> str:
        asked = [self._writer.identity, [dict(one) for one in request.messages], self._drawing(request)]
        return sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:32]
