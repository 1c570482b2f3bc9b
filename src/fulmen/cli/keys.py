"""`fulmen keys`: accounts of the server, their keys and what is paid in."""

from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from fulmen.cli.billing import DEFAULT_STATE, LedgerUrl, State, open_store
from fulmen.errors import ConfigError

if TYPE_CHECKING:
    from fulmen.serving.billing.key_file import KeyRecord
    from fulmen.serving.billing.store import BillingStore

keys_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Make, list and revoke API keys; top up their balances.",
    epilog="FULMEN_API_KEYS holds further keys: name:key,name:key. A running server sees a change at once.",
)

Name = Annotated[
    str, typer.Argument(metavar="NAME", help="The account: letters, digits, ._-", show_default=False)
]


@keys_app.command("add")
def add_command(
    name: Name,
    balance: Annotated[
        str | None,
        typer.Option(
            metavar="AMOUNT",
            help="Pay in this much; at 0 or below the server refuses. [dim]Default: no limit.[/]",
            show_default=False,
        ),
    ] = None,
    concurrency: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Requests at a time. [dim]Default: the server's limit.[/]", show_default=False
        ),
    ] = None,
    strategy: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Keeps long histories within the context: summary, discard_75, discard_all, keep_newest or "
            "hierarchical. [dim]Default: nothing; a request may name one.[/]",
            show_default=False,
        ),
    ] = None,
    state: State = DEFAULT_STATE,
    ledger: LedgerUrl = None,
) -> None:
    """Make a key for a new account, or a new one after revoke, and print it once: only its hash is kept.

    Example: [bold]fulmen keys add alice --balance 10 --concurrency 4[/]
    """
    amount = None if balance is None else parse_amount(balance)
    store = open_store(state, ledger)
    # The key is shown last: without its deposit it would have no limit.
    key = store.accounts.issue(name, concurrency, strategy)
    if amount is not None:
        store.ledger.deposit(name, amount, "keys add")
    typer.echo(key)
    typer.echo(f"{name}: {_balance(store, name)}; the key is not shown again", err=True)


@keys_app.command("list")
def list_command(state: State = DEFAULT_STATE, ledger: LedgerUrl = None) -> None:
    """List accounts: state of the key, limit, what keeps long histories short, balance. Keys are not kept.

    Example: [bold]fulmen keys list[/]
    """
    store = open_store(state, ledger)
    managed = any(record.strategy for _, record in store.accounts)
    table = Table("account", "key", "at a time", "balance", *["long histories"] * managed, box=None)
    for name, record in store.accounts:
        limit = "server's limit" if record.concurrency is None else str(record.concurrency)
        strategy = [record.strategy or "as they are"] if managed else []
        table.add_row(name, _key_in_words(record), limit, _balance(store, name), *strategy)
    Console(highlight=False).print(table if table.rows else f"no accounts in {state}; fulmen keys add NAME")


@keys_app.command("revoke")
def revoke_command(name: Name, state: State = DEFAULT_STATE, ledger: LedgerUrl = None) -> None:
    """Make an account's key worthless. Balance and usage stay, and `add` gives it a new key.

    Example: [bold]fulmen keys revoke alice[/]
    """
    open_store(state, ledger).accounts.revoke(name)
    typer.echo(f"{name}: key revoked", err=True)


@keys_app.command("topup")
def topup_command(
    name: Name,
    amount: Annotated[str, typer.Argument(metavar="AMOUNT", help="What is paid in.", show_default=False)],
    note: Annotated[str, typer.Option(help="A remark to find the payment by.")] = "keys topup",
    state: State = DEFAULT_STATE,
    ledger: LedgerUrl = None,
) -> None:
    """Pay into an account. The first payment sets a limit, and what was used before is owed.

    Example: [bold]fulmen keys topup alice 25 --note "invoice 17"[/]
    """
    paid = parse_amount(amount)
    store = open_store(state, ledger)
    store.accounts.get(name)
    store.ledger.deposit(name, paid, note)
    typer.echo(f"{name}: {_balance(store, name)}", err=True)


def parse_amount(text: str) -> Decimal:
    """An amount of at least 0. Raises ConfigError."""
    from fulmen.serving.billing.prices import to_units

    try:
        amount = Decimal(text)
    except InvalidOperation:
        raise ConfigError(f"amount {text!r} cannot be; use a number like 10 or 2.50") from None
    to_units(amount)
    return amount


def _balance(store: "BillingStore", name: str) -> str:
    from fulmen.serving.billing.prices import money_text

    balance = store.ledger.balance(name)
    return "no limit" if balance is None else f"{money_text(balance)} {store.prices.currency}"


def _key_in_words(record: "KeyRecord") -> str:
    if record.key_sha256 is None:
        return "revoked"
    return f"since {record.issued[:10]}" if record.issued else "in FULMEN_API_KEYS"
