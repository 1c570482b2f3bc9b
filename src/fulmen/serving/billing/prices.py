"""What tokens cost: a table in TOML, in money that is never a float.

    currency = "CNY"

    [rates]             # per million tokens
    hit = 0.2           # of the prompt, found in the prefix cache
    miss = 2            # of the prompt, computed
    output = 3          # generated

    [dense]             # optional: what the same tokens would have cost with dense attention
    hit = 0.5
    miss = 4
    output = 12

Rounding: a request's three terms are added exactly, and the sum is rounded once, half up, to 1e-9 of the
currency (UNIT), the unit of the ledger. Rates with at most three decimals never need it.
"""

import re
import tomllib
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Context, Decimal
from pathlib import Path
from typing import Any, NamedTuple

from fulmen.errors import ConfigError

UNIT_DIGITS = 9
UNIT = Decimal(1).scaleb(-UNIT_DIGITS)
MAX_RATE = 1_000_000
MAX_AMOUNT = 1_000_000_000
_EXACT = Context(prec=60, rounding=ROUND_HALF_UP)


class Tokens(NamedTuple):
    """Tokens of one request: prompt from the cache, prompt computed, generated."""

    hit: int
    miss: int
    output: int


class Rates(NamedTuple):
    """Price per million tokens of each kind, in the table's currency."""

    hit: Decimal
    miss: Decimal
    output: Decimal

    def cost(self, tokens: Tokens) -> Decimal:
        """Price of one request, with nine decimals, rounded as the module says."""
        assert min(tokens) >= 0, tokens
        exact = Decimal(0)
        for rate, count in zip(self, tokens, strict=True):
            exact = _EXACT.fma(rate, count, exact)
        return _EXACT.quantize(exact.scaleb(-6, _EXACT), UNIT)


@dataclass(frozen=True)
class PriceTable:
    """Rates in force, and those of dense attention to compare with."""

    currency: str
    rates: Rates
    dense: Rates | None

    def cost(self, tokens: Tokens) -> Decimal:
        """What a request costs."""
        return self.rates.cost(tokens)

    def dense_cost(self, tokens: Tokens) -> Decimal | None:
        """What it would cost at the dense rates; None without such rates."""
        return None if self.dense is None else self.dense.cost(tokens)


# DeepSeek's list prices: V3.2-Exp (with DSA), and V3.1 (dense) of September 2025.
DEFAULT_PRICES = PriceTable(
    "CNY", Rates(Decimal("0.2"), Decimal(2), Decimal(3)), Rates(Decimal("0.5"), Decimal(4), Decimal(12))
)


def read_prices(path: Path) -> PriceTable:
    """Read a price table. Raises ConfigError that names the file, the key and what it may be."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"), parse_float=Decimal)
    except OSError as error:
        raise ConfigError(
            f"price table {path} cannot be read: {error.strerror}; name another file"
        ) from error
    except ValueError as error:  # no TOML, or no UTF-8
        raise ConfigError(f"price table {path} is no TOML file: {error}; fix it") from error
    if unknown := table.keys() - {"currency", "rates", "dense"}:
        raise ConfigError(f"price table {path}: {min(unknown)} is unknown; use currency, [rates] and [dense]")
    dense = _rates(path, table, "dense") if "dense" in table else None
    return PriceTable(_currency(path, table), _rates(path, table, "rates"), dense)


def to_units(amount: Decimal) -> int:
    """An amount as a whole number of UNITs. Raises ConfigError if it cannot be one."""
    fits = amount.is_finite() and 0 <= amount <= MAX_AMOUNT
    if not fits or amount.quantize(UNIT, context=_EXACT) != amount:
        raise ConfigError(
            f"amount {amount} cannot be; use 0 to {MAX_AMOUNT:,}, with up to {UNIT_DIGITS} decimals"
        )
    return int(amount.scaleb(UNIT_DIGITS, _EXACT))


def from_units(units: int) -> Decimal:
    """The amount that is `units` times UNIT."""
    return Decimal(units).scaleb(-UNIT_DIGITS, _EXACT)


def money_text(amount: Decimal) -> str:
    """An amount in plain digits: no exponent, no trailing zeros ("0.0000002", "12")."""
    return f"{(amount or Decimal(0)).normalize(_EXACT):f}"


def rounded_text(amount: Decimal) -> str:
    """An amount with two decimals; what rounds to nothing has no sign."""
    text = f"{amount:.2f}"
    return text if Decimal(text) else "0.00"


def _currency(path: Path, table: dict[str, Any]) -> str:
    currency = table.get("currency")
    if not isinstance(currency, str) or not re.fullmatch("[A-Z]{3}", currency):
        raise ConfigError(f"price table {path}: currency is {currency!r}; use three capitals, like CNY")
    return currency


def _rates(path: Path, table: dict[str, Any], section: str) -> Rates:
    rates = table.get(section)
    if not isinstance(rates, dict):
        raise ConfigError(
            f"price table {path}: [{section}] is missing; use {', '.join(Rates._fields)} per million tokens"
        )
    if unknown := rates.keys() - set(Rates._fields):
        raise ConfigError(
            f"price table {path}: {section}.{min(unknown)} is unknown; use {', '.join(Rates._fields)}"
        )
    return Rates(*(_rate(path, f"{section}.{kind}", rates.get(kind)) for kind in Rates._fields))


def _rate(path: Path, key: str, value: Any) -> Decimal:
    is_number = isinstance(value, int | Decimal) and not isinstance(value, bool)
    if not is_number or not Decimal(value).is_finite() or not 0 <= value <= MAX_RATE:
        shown = "missing" if value is None else repr(value) if isinstance(value, str) else str(value)
        raise ConfigError(
            f"price table {path}: {key} is {shown}; use a number from 0 to {MAX_RATE:,} (per million tokens)"
        )
    return Decimal(value)
