"""`fulmen usage`: what was asked of the server, and what it cost."""

import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from fulmen.cli.billing import DEFAULT_STATE, LedgerUrl, State, open_store
from fulmen.evaluation.wording import percent

if TYPE_CHECKING:
    from fulmen.serving.billing.usage_export import Total

FORMATS = ["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S"]


def usage_command(
    key: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="One account. [dim]Default: all of them.[/]", show_default=False),
    ] = None,
    since: Annotated[
        datetime | None,
        typer.Option(formats=FORMATS, help="First moment, in UTC.", show_default=False),
    ] = None,
    until: Annotated[
        datetime | None,
        typer.Option(formats=FORMATS, help="First moment no longer wanted, in UTC.", show_default=False),
    ] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print every request as a line of CSV.")] = False,
    state: State = DEFAULT_STATE,
    ledger: LedgerUrl = None,
) -> None:
    """Show tokens and charges by account, or every request as CSV.

    Example: [bold]fulmen usage --key alice --since 2026-11-01 --csv > alice.csv[/]
    """
    store = open_store(state, ledger)
    from fulmen.serving.billing.usage_export import totals, write_csv

    rows = store.ledger.rows(key, _utc(since), _utc(until))
    if as_csv:
        write_csv(rows, sys.stdout)
    else:
        _print_totals(totals(rows), store.prices.currency)


def _utc(moment: datetime | None) -> datetime | None:
    return None if moment is None else moment.replace(tzinfo=UTC)


def _print_totals(by_account: "dict[str, Total]", currency: str) -> None:
    from fulmen.serving.billing.prices import money_text

    table = Table("account", box=None)
    for name in ("requests", "prompt, hit", "prompt, miss", "output", currency, "read by DSA", "GB saved"):
        table.add_column(name, justify="right", no_wrap=True)
    for account, total in by_account.items():
        share = percent(total.tokens_read / total.context_tokens, 1) if total.context_tokens else ""
        counts = (total.requests, total.prompt_hit, total.prompt_miss, total.output)
        saved = f"{total.bytes_saved / 1e9:,.1f}"
        table.add_row(account, *(f"{n:,}" for n in counts), money_text(total.charge), share, saved)
    Console(highlight=False).print(table if by_account else "no requests")
