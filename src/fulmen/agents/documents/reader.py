"""A file's bytes as text: plain text and source code here, HTML and PDF in a worker with a time limit."""

import json
import signal
import subprocess
import sys
import threading
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

from fulmen.agents.documents.folder import FolderFile

MAX_FILE_BYTES = 16 * 2**20
TIME_LIMIT_S = 20.0
# As much is looked at before the rest of a file is read.
HEAD_BYTES = 8192
# Beyond this share of characters that are none, a file is no text.
MAX_BAD_SHARE = 0.1
BAD = "\N{REPLACEMENT CHARACTER}"
BYTE_ORDER_MARKS = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
PDF_MARK = b"%PDF-"
HTML_SUFFIXES = (".html", ".htm", ".xhtml")


class Unreadable(Exception):
    """Why a file has no text, in a few words."""


class Reading(NamedTuple):
    """A file's text, lines ending in a newline character alone; what is to say about it, or nothing."""

    text: str
    remark: str


def readers_version() -> str:
    """Changes when the same file may be read otherwise."""
    try:
        return f"1, pypdf {version('pypdf')}"
    except PackageNotFoundError:
        return "1"


def contents(file: FolderFile) -> bytes:
    """A file's bytes. Raises Unreadable for what is too large, binary or cannot be read."""
    if file.status.st_size > MAX_FILE_BYTES:
        raise Unreadable(f"larger than {MAX_FILE_BYTES // 2**20} MiB")
    try:
        with file.opened() as opened:
            head = opened.read(HEAD_BYTES)
            if _kind(file.path, head) == "text" and not _encoding(head) and b"\0" in head:
                raise Unreadable("binary")
            content = head + opened.read(MAX_FILE_BYTES - len(head) + 1)
    except OSError as error:
        raise Unreadable(f"cannot be read ({error.strerror})") from error
    if len(content) > MAX_FILE_BYTES:
        raise Unreadable(f"larger than {MAX_FILE_BYTES // 2**20} MiB")
    return content


class TextReader:
    """Makes text of bytes. The worker is started when it is first needed; `close` ends it."""

    def __init__(self, time_limit_s: float = TIME_LIMIT_S) -> None:
        self._time_limit_s = time_limit_s
        self._worker: subprocess.Popen[bytes] | None = None

    def read(self, path: str, content: bytes) -> Reading:
        """A file's text. Raises Unreadable."""
        kind = _kind(path, content)
        if kind == "pdf":
            return Reading(self._ask(kind, content), "")
        text, remark = _decoded(content)
        if kind == "html":
            text = self._ask(kind, text.encode())
        return Reading(text, remark)

    def close(self) -> None:
        """End the worker."""
        if self._worker is not None:
            self._worker.kill()
            self._worker.communicate()
            self._worker = None

    def _ask(self, kind: str, content: bytes) -> str:
        worker = self._worker = self._worker or _start_worker()
        assert worker.stdin is not None
        assert worker.stdout is not None
        timer = threading.Timer(self._time_limit_s, worker.kill)
        timer.start()
        try:
            worker.stdin.write(json.dumps({"kind": kind, "size": len(content)}).encode() + b"\n" + content)
            worker.stdin.flush()
            line = worker.stdout.readline()
        except BrokenPipeError:
            line = b""
        finally:
            timer.cancel()
        if not line:
            status = worker.wait()
            self.close()
            is_out_of_time = status == -signal.SIGKILL
            limit = f"not read within {self._time_limit_s:g} s"
            raise Unreadable(limit if is_out_of_time else f"its reader ended with status {status}")
        answer = json.loads(line)
        if "reason" in answer:
            raise Unreadable(answer["reason"])
        return _plain_newlines(answer["text"])


def _start_worker() -> "subprocess.Popen[bytes]":
    script = Path(__file__).with_name("worker.py")
    # -P: modules beside the script are not those of the standard library.
    command = [sys.executable, "-P", str(script)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)


def _kind(path: str, content: bytes) -> str:
    suffix = Path(path).suffix.lower()
    if content.startswith(PDF_MARK) or (suffix == ".pdf" and PDF_MARK in content[:1024]):
        return "pdf"
    return "html" if suffix in HTML_SUFFIXES else "text"


def _encoding(content: bytes) -> str:
    """What a byte order mark says; nothing without one."""
    return next((name for mark, name in BYTE_ORDER_MARKS.items() if content.startswith(mark)), "")


def _decoded(content: bytes) -> Reading:
    encoding = _encoding(content)
    if b"\0" in content and not encoding:
        raise Unreadable("binary")
    text = content.decode(encoding or "utf-8", "replace")
    bad = text.count(BAD) - content.count(BAD.encode())
    if bad > MAX_BAD_SHARE * len(text):
        raise Unreadable("no text in UTF-8")
    return Reading(_plain_newlines(text), f"bad UTF-8: {bad:,} places shown as {BAD}" if bad > 0 else "")


def _plain_newlines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")
