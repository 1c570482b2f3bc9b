"""What a request used: noted while it streams, and shown at its end."""

from typing import Any

from fulmen.serving.billing.ledger import AttentionReads
from fulmen.serving.billing.prices import PriceTable, Tokens, money_text


class UsageCounter:
    """The engine's counts for one request, as far as they came.

    How much of the prompt lay in the cache is said at the end alone. Where there is no such end, because
    engine or gateway crashed, the prompt counts as cached: the doubt is the customer's.
    """

    def __init__(self) -> None:
        self.prompt = 0
        self._outputs: dict[int, int] = {}
        self.cached: int | None = None
        self.reasoning: int | None = None

    @property
    def output(self) -> int:
        """Tokens generated, of all choices."""
        return sum(self._outputs.values())

    @property
    def tokens(self) -> Tokens:
        """What is charged for."""
        hit = self.prompt if self.cached is None else min(self.cached, self.prompt)
        return Tokens(hit, self.prompt - hit, self.output)

    def note(self, choice: int, usage: dict[str, Any]) -> None:
        """Usage that a chunk of one choice brought: the prompt's, and that choice's own output."""
        self.prompt = usage.get("prompt_tokens") or 0
        self._outputs[choice] = max(self._outputs.get(choice, 0), usage.get("completion_tokens") or 0)

    def finish(self, usage: dict[str, Any]) -> None:
        """Usage of the whole request."""
        self.prompt = usage.get("prompt_tokens") or 0
        self._outputs = {0: usage.get("completion_tokens") or 0}
        self.cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        self.reasoning = (usage.get("completion_tokens_details") or {}).get("reasoning_tokens")

    def finish_anthropic(self, usage: dict[str, Any]) -> None:
        """The same in Anthropic's words, where `input_tokens` leaves out what the cache read or took."""
        self.cached = usage.get("cache_read_input_tokens") or 0
        fresh = (usage.get("input_tokens") or 0) + (usage.get("cache_creation_input_tokens") or 0)
        self.prompt = self.cached + fresh
        self._outputs = {0: usage.get("output_tokens") or 0}


def usage_for_client(seen: UsageCounter, bill: dict[str, Any]) -> dict[str, Any]:
    """`usage` as OpenAI's clients and DeepSeek's read it, and the bill under `fulmen`."""
    hit, miss, output = seen.tokens
    return {
        "prompt_tokens": hit + miss,
        "completion_tokens": output,
        "total_tokens": hit + miss + output,
        "prompt_tokens_details": {"cached_tokens": hit},
        "completion_tokens_details": {"reasoning_tokens": seen.reasoning or 0},
        "prompt_cache_hit_tokens": hit,
        "prompt_cache_miss_tokens": miss,
        "fulmen": bill,
    }


def bill_for_client(prices: PriceTable, tokens: Tokens, charge: Any, reads: AttentionReads) -> dict[str, Any]:
    """What a request cost, what it would have cost dense, and what attention read for it."""
    dense = prices.dense_cost(tokens)
    return {
        "cost": money_text(charge),
        "dense_cost": None if dense is None else money_text(dense),
        "currency": prices.currency,
        **reads._asdict(),
    }
