"""Where a server's keys, prices and ledger are: options of several commands, and how to open them."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fulmen.errors import ConfigError

if TYPE_CHECKING:
    from fulmen.serving.billing.store import BillingStore

DEFAULT_STATE = Path("~/.local/share/fulmen")

State = Annotated[
    Path,
    typer.Option(
        metavar="DIR",
        envvar="FULMEN_STATE",
        help="Folder of the server's keys (as hashes), its secret, ledger.db and, if the default prices are "
        "not wanted, prices.toml.",
    ),
]
LedgerUrl = Annotated[
    str | None,
    typer.Option(
        "--ledger",
        metavar="URL",
        envvar="FULMEN_LEDGER",
        help="PostgreSQL ledger, postgresql://USER:PASSWORD@HOST/NAME; better in the variable, where no list "
        "of processes shows it. [dim]Default: ledger.db in the state folder.[/]",
        show_default=False,
    ),
]


def open_store(state: Path, ledger_url: str | None) -> "BillingStore":
    """Open the state folder, with the keys of the environment. Raises ConfigError if the extra is missing."""
    try:
        from fulmen.serving.billing.accounts import VARIABLE
        from fulmen.serving.billing.store import open_billing
    except ModuleNotFoundError as error:
        raise missing_extra(error) from error
    return open_billing(state.expanduser(), ledger_url, os.environ.get(VARIABLE, ""))


def missing_extra(error: ModuleNotFoundError) -> ConfigError:
    """The error for a package of the extra `serve` that is not installed."""
    return ConfigError(f"the package {error.name} is not installed; run: pip install 'fulmen[serve]'")
