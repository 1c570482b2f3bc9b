"""Numbers and tables as every report writes them."""

from collections.abc import Mapping, Sequence
from typing import Any


def percent(share: float, digits: int = 2) -> str:
    """A share as "0.57 %"."""
    return f"{100 * share:.{digits}f} %"


def signed_percent(share: float, digits: int = 2) -> str:
    """A change as "+0.57 %"."""
    return f"{100 * share:+.{digits}f} %"


def limits_text(interval: Mapping[str, Any]) -> str:
    """The limits of an interval of shares."""
    if interval["low"] is None:
        return "no interval from one sequence"
    return f"95 % interval {signed_percent(interval['low'])} to {signed_percent(interval['high'])}"


def interval_text(interval: Mapping[str, Any], digits: int = 2) -> str:
    """Estimate and limits of an interval of shares, short."""
    estimate, low, high = (interval[name] for name in ("estimate", "low", "high"))
    if low is None:
        return signed_percent(estimate, digits)
    limits = f"({signed_percent(low, digits)} to {signed_percent(high, digits)})"
    return f"{signed_percent(estimate, digits)} {limits}"


def shares_text(interval: Mapping[str, Any]) -> str:
    """The limits of an interval of a share, as "89.1 to 97.8 %"."""
    return f"{100 * interval['low']:.1f} to {100 * interval['high']:.1f} %"


def nats_text(interval: Mapping[str, Any]) -> str:
    """Estimate and limits of an interval of differences in nats."""
    estimate, low, high = (interval[name] for name in ("estimate", "low", "high"))
    return f"{estimate:+.4f}" if low is None else f"{estimate:+.4f} ({low:+.4f} to {high:+.4f})"


def points_text(interval: Mapping[str, Any]) -> str:
    """Estimate and limits of an interval in points."""
    if interval["low"] is None:
        return f"{interval['estimate']:+.1f} (no interval from one text)"
    return f"{interval['estimate']:+.1f} ({interval['low']:+.1f} to {interval['high']:+.1f})"


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """A table whose first row is the header."""
    header, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([header, "|" + " --- |" * len(rows[0]), *body])


def markdown_facts(facts: Mapping[str, str]) -> str:
    """Names and values, for a report's end."""
    return "\n".join(f"- {name}: {value}" for name, value in facts.items())
