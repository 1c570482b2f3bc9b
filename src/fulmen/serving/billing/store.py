"""What a server keeps in its state folder, opened together.

keys.json      accounts and the hashes of their keys
secret         32 random bytes that salts are made from
prices.toml    the price table, where another than the default is wanted
ledger.db      the ledger, unless it is a PostgreSQL database elsewhere
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from fulmen.errors import AccountError
from fulmen.serving.billing.accounts import Accounts
from fulmen.serving.billing.key_file import open_lock
from fulmen.serving.billing.ledger import Ledger
from fulmen.serving.billing.prices import DEFAULT_PRICES, PriceTable, read_prices

PRICES, LEDGER, RUNNING = "prices.toml", "ledger.db", ".running"


class BillingStore(NamedTuple):
    """Prices, keys and money of one server."""

    prices: PriceTable
    accounts: Accounts
    ledger: Ledger


def open_billing(folder: Path, ledger_url: str | None = None, api_keys: str = "") -> BillingStore:
    """Open what is in the folder, and make what is not.

    Args:
        folder: the state folder.
        ledger_url: a database in place of the folder's own file.
        api_keys: plain keys, as in FULMEN_API_KEYS.

    Raises ConfigError for a bad price table, AccountError, LedgerError, and OutputError for a folder that
    cannot be written.
    """
    file = folder / PRICES
    prices = read_prices(file) if file.exists() else DEFAULT_PRICES
    accounts = Accounts(folder, api_keys)
    return BillingStore(prices, accounts, Ledger(ledger_url or folder / LEDGER, prices, accounts.server))


@contextmanager
def running(folder: Path) -> Iterator[None]:
    """Hold the folder as its one server, from before `recover`, which takes open requests for a crash's.

    Raises AccountError if another process holds it. A killed process holds nothing.
    """
    lock = open_lock(folder, RUNNING)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise AccountError(
            f"another server runs with the state folder {folder}; stop it, or name another folder"
        ) from None
    finally:
        os.close(lock)
