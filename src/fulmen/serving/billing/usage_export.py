"""Usage for people and their tools: CSV, and totals by account."""

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any, TextIO

from fulmen.serving.billing.ledger import Usage
from fulmen.serving.billing.prices import money_text


@dataclass
class Total:
    """Sums over one account's requests; the last three over those whose reading is known."""

    requests: int = 0
    prompt_hit: int = 0
    prompt_miss: int = 0
    output: int = 0
    charge: Decimal = Decimal(0)
    context_tokens: int = 0
    tokens_read: int = 0
    bytes_saved: int = 0

    def add(self, row: Usage) -> None:
        """Count one request."""
        self.requests += 1
        for name in ("prompt_hit", "prompt_miss", "output", "context_tokens", "tokens_read", "bytes_saved"):
            setattr(self, name, getattr(self, name) + (getattr(row, name) or 0))
        self.charge += row.charge or 0


def totals(rows: Iterable[Usage]) -> dict[str, Total]:
    """Totals by account, in the order of their names."""
    found: dict[str, Total] = {}
    for row in rows:
        found.setdefault(row.account, Total()).add(row)
    return dict(sorted(found.items()))


def write_csv(rows: Iterable[Usage], out: TextIO) -> None:
    """One line a request, fields as in `Usage`: amounts in plain digits, ISO times in UTC, empty: unknown."""
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(Usage._fields)
    writer.writerows([_cell(value) for value in row] for row in rows)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, Decimal):
        return money_text(value)
    return value.isoformat(timespec="milliseconds") if isinstance(value, datetime) else str(value)
