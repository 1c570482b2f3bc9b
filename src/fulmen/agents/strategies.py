"""What an agent keeps of a long history: what `fulmen.messages.strategies` has, where agents look for it."""

from fulmen.messages.strategies import (
    OMITTED,
    SUMMARY_HEAD,
    SUMMARY_NAME,
    TRIGGER,
    Counter,
    Strategy,
    at_every_call,
    digest,
    discard_75,
    discard_all,
    hierarchical,
    keep_newest,
    none,
    parallel_fewest_steps,
    summary,
)

__all__ = [
    "OMITTED",
    "SUMMARY_HEAD",
    "SUMMARY_NAME",
    "TRIGGER",
    "Counter",
    "Strategy",
    "at_every_call",
    "digest",
    "discard_75",
    "discard_all",
    "hierarchical",
    "keep_newest",
    "none",
    "parallel_fewest_steps",
    "summary",
]
