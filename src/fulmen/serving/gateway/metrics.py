"""The gateway's metrics for Prometheus. The engine has its own, at its own address."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from fulmen.serving.billing.ledger import AttentionReads
from fulmen.serving.billing.prices import Tokens

_SHORT_S = (0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128)
_LONG_S = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """Counters of one gateway. No label tells one account from another."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "fulmen_requests", "Requests ended.", ["endpoint", "outcome"], registry=registry
        )
        self.tokens = Counter("fulmen_tokens", "Tokens charged for.", ["kind"], registry=registry)
        self.charges = Counter("fulmen_charges", "Money charged.", ["currency"], registry=registry)
        self.context = Counter(
            "fulmen_context_tokens", "Tokens that dense attention would have read.", registry=registry
        )
        self.read = Counter(
            "fulmen_read_tokens", "Tokens that attention read, mean over layers.", registry=registry
        )
        self.saved = Counter(
            "fulmen_saved_bytes", "Bytes of cache not read, thanks to DSA.", registry=registry
        )
        self.first_token = Histogram(
            "fulmen_first_token_seconds",
            "From the request to the first token sent.",
            buckets=_LONG_S,
            registry=registry,
        )
        self.overhead = Histogram(
            "fulmen_overhead_seconds",
            "The gateway's own part of that.",
            buckets=_SHORT_S,
            registry=registry,
        )
        self.open = Gauge("fulmen_open_requests", "Requests under way.", registry=registry)
        self.engine_restarts = Gauge("fulmen_engine_restarts", "Restarts of the engine.", registry=registry)

    def ended(self, endpoint: str, outcome: str) -> None:
        """One request has ended, whichever way."""
        self.requests.labels(endpoint, outcome).inc()

    def billed(self, tokens: Tokens, charge: float, currency: str, reads: AttentionReads) -> None:
        """One request was charged for."""
        for kind, count in tokens._asdict().items():
            self.tokens.labels(kind).inc(count)
        self.charges.labels(currency).inc(charge)
        self.context.inc(reads.context_tokens)
        self.read.inc(reads.tokens_read)
        self.saved.inc(max(0, reads.bytes_saved))

    def text(self) -> tuple[bytes, str]:
        """The page that Prometheus reads, and its media type."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST
