"""Who may ask: accounts and their API keys, from the state folder and from the environment.

An account is its name. Its key can be revoked and issued anew; balance and usage stay with the name. Plain
keys are seen twice: when `issue` returns one, to be shown once, and when a client sends one. What is kept, in
files and in memory, are hashes.
"""

import hmac
import secrets
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path

from fulmen.config import require_positive_int
from fulmen.errors import AccountError, ConfigError
from fulmen.serving.billing.key_file import (
    KEYS,
    NAME,
    STRATEGIES,
    STRATEGIES_TEXT,
    KeyRecord,
    hash_key,
    locked,
    read_keys,
    read_secret,
    require_name,
    write_keys,
)

VARIABLE = "FULMEN_API_KEYS"
KEY_PREFIX, KEY_BYTES, SHORTEST_KEY = "sk-", 32, 16


@dataclass(frozen=True)
class Account:
    """One account: nothing secret is in its id; the salt keeps its prefix cache apart from others'."""

    id: str
    concurrency: int | None
    salt: str = field(repr=False)
    strategy: str | None = None

    @property
    def name(self) -> str:
        """What people call it: an account's id is its name."""
        return self.id


class Accounts:
    """Keys in force. A change of the key file by `fulmen keys` counts from the next request on.

    Args:
        folder: the state folder; made if it is not there.
        environment: plain keys, "name:key,name:key", as in FULMEN_API_KEYS.

    Raises AccountError for a damaged key file, a bad entry, or a name that both sides have.
    """

    def __init__(self, folder: Path, environment: str = "") -> None:
        self._folder = folder
        self._secret = read_secret(folder)
        self._environment = parse_environment(environment)
        self._lock = threading.Lock()
        self._seen: tuple[int, ...] | None = None
        self._records: dict[str, KeyRecord] = {}
        self._refresh()

    @property
    def server(self) -> str:
        """A public name of this state folder, for the ledger to know its own requests by."""
        return self._derive("server")[:16]

    def find(self, key: str) -> Account | None:
        """The account of a key, or None. Takes the same time for any key: all hashes are compared in full."""
        found, presented = None, hash_key(key)
        for name, record in self._refresh().items():
            if hmac.compare_digest(record.key_sha256 or "", presented):
                found = name
        return None if found is None else self.get(found)

    def get(self, name: str) -> Account:
        """The account of that name, its key in force or not. Raises AccountError if there is none."""
        record = self._refresh().get(name)
        if record is None:
            raise AccountError(f"there is no account {name[:80]!r}; `fulmen keys list` shows them")
        return Account(name, record.concurrency, self._derive(f"salt:{name}"), record.strategy)

    def __iter__(self) -> Iterator[tuple[str, KeyRecord]]:
        """Names and records of all accounts, those with a revoked key too."""
        return iter(sorted(self._refresh().items()))

    def __len__(self) -> int:
        """Number of accounts, those with a revoked key too: with any, a server must ask for keys.

        Counting keys in force instead would open the server to all when the last one is revoked.
        """
        return len(self._refresh())

    def issue(self, name: str, concurrency: int | None = None, strategy: str | None = None) -> str:
        """Make a key for a new account, or for one whose key was revoked, and return it: it is kept nowhere.

        Args:
            concurrency: requests at a time; None: the server's limit.
            strategy: one of STRATEGIES, for histories that outgrow the context; None: nothing is done.

        Raises AccountError if the name cannot be or has a key, ConfigError for a limit below 1 or a strategy
        that is none, OutputError.
        """
        require_name(name)
        if strategy is not None and strategy not in STRATEGIES:
            raise ConfigError(f"strategy={strategy!r:.80} is none; {STRATEGIES_TEXT}", arguments=["strategy"])
        if concurrency is not None:
            require_positive_int("concurrency", concurrency)
        key = KEY_PREFIX + secrets.token_urlsafe(KEY_BYTES)
        with locked(self._folder):
            self._require_free(name)
            now = datetime.now(UTC).isoformat(timespec="seconds")
            record = KeyRecord(hash_key(key), concurrency, now, strategy)
            write_keys(self._folder, {**read_keys(self._folder), name: record})
        return key

    def revoke(self, name: str) -> None:
        """Make an account's key worthless; the account stays. Raises AccountError if it has none here."""
        if name in self._environment:
            raise AccountError(f"the key of {name} comes from {VARIABLE}; remove it there")
        with locked(self._folder):
            records = read_keys(self._folder)
            if name not in records or records[name].key_sha256 is None:
                raise AccountError(f"{name[:80]!r} has no key to revoke; `fulmen keys list` shows all")
            old = records[name]
            write_keys(self._folder, {**records, name: replace(old, key_sha256=None)})

    def _require_free(self, name: str) -> None:
        if name in self._environment:
            raise AccountError(f"{name} has a key in {VARIABLE}; take another name")
        record = read_keys(self._folder).get(name)
        if record is not None and record.key_sha256 is not None:
            raise AccountError(f"{name} has a key; take another name, or `fulmen keys revoke {name}` first")

    def _refresh(self) -> dict[str, KeyRecord]:
        """All records, read again if the file is another one than last time; one that is gone is an error."""
        with self._lock:
            if (stamp := self._stamp()) != self._seen:
                if self._seen and not stamp:
                    raise AccountError(f"{self._folder / KEYS} is gone; restore it, or start the server anew")
                records = read_keys(self._folder)
                if twice := records.keys() & self._environment.keys():
                    raise AccountError(
                        f"{min(twice)} is in {VARIABLE} and in {self._folder / KEYS}; rename one"
                    )
                self._records, self._seen = {**records, **self._environment}, stamp
            return self._records

    def _stamp(self) -> tuple[int, ...]:
        try:
            file = (self._folder / KEYS).stat()
        except FileNotFoundError:
            return ()
        return file.st_ino, file.st_mtime_ns, file.st_size

    def _derive(self, purpose: str) -> str:
        return hmac.new(self._secret, purpose.encode(), sha256).hexdigest()


def parse_environment(text: str) -> dict[str, KeyRecord]:
    """Hashed records of "name:key,name:key". Raises AccountError, which names the entry, never the key."""
    records: dict[str, KeyRecord] = {}
    for place, entry in enumerate(filter(None, map(str.strip, text.split(","))), start=1):
        name, colon, key = entry.partition(":")
        # Neither entry nor name is shown while the name may be a key.
        if not colon:
            raise AccountError(f"{VARIABLE}: entry {place} has no colon; write name:key")
        if not NAME.fullmatch(name):
            raise AccountError(f"{VARIABLE}: the name of entry {place} cannot be; write name:key")
        if name in records:
            raise AccountError(f"{VARIABLE}: {name} is there twice; give each key a name of its own")
        if len(key) < SHORTEST_KEY or not key.isascii() or not key.isprintable() or " " in key:
            raise AccountError(
                f"{VARIABLE}: the key of {name} cannot be; use {SHORTEST_KEY} or more random characters"
            )
        if any(hash_key(key) == other.key_sha256 for other in records.values()):
            raise AccountError(f"{VARIABLE}: the key of {name} is another account's too; keys must differ")
        records[name] = KeyRecord(hash_key(key), None, "")
    return records
