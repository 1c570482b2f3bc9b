"""What the requests of a question used and cost, added up as their answers come."""

from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from typing import Any

from fulmen.serving.billing.prices import DEFAULT_PRICES, Tokens, money_text

# More are no count, and no sum of money.
MOST_TOKENS, MOST_DIGITS = 10**12, 30


@dataclass
class Bill:
    """Tokens and money, of all requests that were answered.

    hit, miss: tokens of prompts, found in the prefix cache or not. cost, dense_cost: what the server said, in
    its currency; None where it says nothing. broken_off: requests that ended without an account of their
    tokens, which the server may have charged.
    """

    hit: int = 0
    miss: int = 0
    output: int = 0
    requests: int = 0
    broken_off: int = 0
    cost: Decimal | None = None
    dense_cost: Decimal | None = None
    currency: str | None = None
    prompts: list[int] = field(default_factory=list)

    def add(self, usage: Any) -> None:
        """The usage of one answer, in OpenAI's words, DeepSeek's or fulmen's."""
        usage = usage if isinstance(usage, dict) else {}
        prompt = _count(usage.get("prompt_tokens"))
        details = usage.get("prompt_tokens_details")
        cached = details.get("cached_tokens") if isinstance(details, dict) else None
        hit = min(prompt, _count(usage.get("prompt_cache_hit_tokens", cached)))
        self.requests += 1
        self.hit, self.miss = self.hit + hit, self.miss + prompt - hit
        self.output += _count(usage.get("completion_tokens"))
        self.prompts.append(prompt)
        charged = usage.get("fulmen")
        if isinstance(charged, dict) and (cost := _amount(charged.get("cost"))) is not None:
            self.cost = (self.cost or Decimal(0)) + cost
            self.currency = str(charged.get("currency") or "")
            if dense_cost := _amount(charged.get("dense_cost")):
                self.dense_cost = (self.dense_cost or Decimal(0)) + dense_cost

    @property
    def list_cost(self) -> Decimal:
        """What the same tokens cost at DeepSeek-V3.2's list prices, in CNY."""
        return DEFAULT_PRICES.cost(Tokens(self.hit, self.miss, self.output))

    def to_dict(self) -> dict[str, Any]:
        """Usage and cost, amounts as strings."""
        listed = {"amount": money_text(self.list_cost), "currency": DEFAULT_PRICES.currency}
        return {
            "usage": {
                "requests": self.requests,
                "prompt_cache_hit_tokens": self.hit,
                "prompt_cache_miss_tokens": self.miss,
                "completion_tokens": self.output,
                "broken_off_requests": self.broken_off,
            },
            "cost": {
                "amount": None if self.cost is None else money_text(self.cost),
                "currency": self.currency,
                "dense_amount": None if self.dense_cost is None else money_text(self.dense_cost),
                "deepseek_list": listed,
            },
        }

    def text(self) -> str:
        """One line."""
        tokens = f"prompt {self.hit:,} hit, {self.miss:,} miss, output {self.output:,} tokens"
        parts = [f"{tokens} in {self.requests} request{'s' * (self.requests != 1)}"]
        if self.cost is not None:
            parts.append(f"{money_text(self.cost)} {self.currency}")
        if self.dense_cost is not None:
            parts.append(f"{money_text(self.dense_cost)} with dense attention")
        parts.append(f"{money_text(self.list_cost)} {DEFAULT_PRICES.currency} at DeepSeek's list prices")
        if self.broken_off:
            parts.append(f"{self.broken_off} broken off, whose tokens are not known")
        return "; ".join(parts)


def _count(value: Any) -> int:
    is_count = isinstance(value, int) and not isinstance(value, bool) and 0 < value < MOST_TOKENS
    return value if is_count else 0


def _amount(value: Any) -> Decimal | None:
    """Money as text; None for what is none."""
    try:
        amount = Decimal(value) if isinstance(value, str) else None
    except InvalidOperation:
        return None
    is_sum = amount is not None and amount.is_finite() and abs(amount.adjusted()) < MOST_DIGITS
    return amount if is_sum else None
