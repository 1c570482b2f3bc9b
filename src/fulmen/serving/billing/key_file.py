"""The files behind API keys, in the state folder: hashes of keys, and the server's secret.

`keys.json` holds SHA-256 hashes. A fast hash is enough here: a key is 32 random bytes, which nobody can
guess at any speed; slow, salted hashes protect passwords that people think up. The file is not to be edited
by hand: `fulmen keys` writes it, under a lock, atomically. Both files are their owner's alone.
"""

import fcntl
import json
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from fulmen.errors import AccountError, unwritable
from fulmen.files import write_file

KEYS, SECRET, LOCK = "keys.json", "secret", ".lock"
SECRET_BYTES = 32
# Of `fulmen.messages.strategies`, for the requests of a key that do not name one themselves.
STRATEGIES = ("summary", "discard_75", "discard_all", "keep_newest", "hierarchical")
STRATEGIES_TEXT = f"use one of {', '.join(STRATEGIES)}"
# What begins like a key is none: a mix-up of the two would put the key on show.
NAME = re.compile(r"(?!sk-)[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_HASH = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class KeyRecord:
    """One account of the file.

    Attributes:
        key_sha256: its key's hash; None: revoked.
        concurrency: requests at a time; None: the server's limit.
        issued: when the key was issued (ISO).
        strategy: what keeps its histories within the context, one of STRATEGIES; None: nothing.
    """

    key_sha256: str | None
    concurrency: int | None
    issued: str
    strategy: str | None = None


def hash_key(key: str) -> str:
    """SHA-256 of a key, in hex; of any text at all, as clients send what they like."""
    return sha256(key.encode("utf-8", "backslashreplace")).hexdigest()


def require_name(name: str) -> str:
    """Return an account's name if it can be one, else raise AccountError."""
    if not NAME.fullmatch(name):
        raise AccountError(
            f"account name {name[:80]!r} cannot be; use up to 64 letters, digits and ._- (not sk- first)"
        )
    return name


def open_lock(folder: Path, name: str) -> int:
    """A lock file's descriptor, not locked yet; the folder is made if need be. Raises OutputError."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise unwritable(folder, error) from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make the folder if need be, and hold its lock against other processes. Raises OutputError."""
    lock = open_lock(folder, LOCK)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def read_keys(folder: Path) -> dict[str, KeyRecord]:
    """Accounts by name; none if there is no file. Raises AccountError for a file that is not ours."""
    file = folder / KEYS
    try:
        accounts = json.loads(file.read_text(encoding="utf-8"))["accounts"]
        return {require_name(name): _record(file, name, fields) for name, fields in accounts.items()}
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise AccountError(f"{file} cannot be read: {error.strerror}; give this user the right to") from error
    except AccountError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError):
        # Without the cause, whose text may quote what the file holds.
        raise AccountError(f"{file} is no key file; restore it, or remove it and add keys anew") from None


def write_keys(folder: Path, records: dict[str, KeyRecord]) -> None:
    """Replace the file; call it under the lock. Raises OutputError."""
    accounts = {name: asdict(record) for name, record in sorted(records.items())}
    write_private(folder / KEYS, json.dumps({"accounts": accounts}, indent=1) + "\n")


def read_secret(folder: Path) -> bytes:
    """The server's secret, made at the first call. Raises AccountError if others can read it or it is cut."""
    file = folder / SECRET
    with locked(folder):
        if not file.exists():
            write_private(file, secrets.token_hex(SECRET_BYTES) + "\n")
    if file.stat().st_mode & 0o077:
        raise AccountError(f"{file} can be read by other users; run: chmod 600 {file}")
    text = file.read_text(encoding="utf-8", errors="replace").strip()
    if not _HASH.fullmatch(text):
        raise AccountError(f"{file} is damaged; remove it, and a new one is made")
    return bytes.fromhex(text)


def write_private(file: Path, text: str) -> None:
    """Write a text that only its owner can read. Raises OutputError."""
    write_file(file, text, mode=0o600)


def _record(file: Path, name: str, fields: dict[str, Any]) -> KeyRecord:
    if unknown := fields.keys() - set(KeyRecord.__dataclass_fields__):
        # Its value is not shown: it may be a key.
        raise AccountError(
            f"{file}: {min(unknown)} of {name} is unknown, only hashes of keys belong here; "
            f"remove it, and let `fulmen keys add` make the key"
        )
    record = KeyRecord(**fields)
    hashed, limit = record.key_sha256, record.concurrency
    if hashed is not None and not _HASH.fullmatch(hashed):
        raise AccountError(f"{file}: key_sha256 of {name} is no SHA-256 hash; remove it and add a new key")
    if limit is not None and (type(limit) is not int or limit < 1):
        raise AccountError(f"{file}: concurrency={limit!r} of {name} cannot be; use an integer of at least 1")
    if record.strategy is not None and record.strategy not in STRATEGIES:
        raise AccountError(f"{file}: strategy={record.strategy!r:.80} of {name} is none; {STRATEGIES_TEXT}")
    return record
