"""What the calls of a recorded run would have cost under a strategy: prompt tokens hit, missed, and written.

Exact without a model, as far as the record goes: a model that had seen less might have gone on otherwise.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from fulmen.errors import ConfigError
from fulmen.messages.message import Message, check_messages
from fulmen.messages.strategies import Strategy

# Tokens that a prefix cache keeps or drops together, as in vLLM.
BLOCK_TOKENS = 16


class ReplayTokens(NamedTuple):
    """Tokens of all calls: prompt from the cache, prompt computed, generated."""

    hit: int
    miss: int
    written: int


def replay(
    trace: Sequence[Message],
    strategy: Strategy,
    budget: int,
    tokenize: Callable[[Sequence[Message]], Sequence[int]],
) -> ReplayTokens:
    """Count a recorded run's tokens as if its messages had gone through a strategy before each call.

    A call hits as many whole blocks of BLOCK_TOKENS as its prompt shares with the call before it, prompt and
    reply, but for its last token, which is computed always.

    Args:
        trace: the messages of a run without any strategy; each assistant's message is the reply of a call.
        strategy: see `fulmen.agents.strategies`.
        budget: tokens that a prompt may have.
        tokenize: a prompt's tokens, such as those of `encode`'s text; a reply's are those by which they grow.

    Raises what the strategy does, ConfigError for a reply that makes the tokens fewer.
    """
    check_messages(trace)
    history: list[Message] = []
    previous: Sequence[int] = ()
    total = ReplayTokens(0, 0, 0)
    for message in trace:
        if message["role"] == "assistant":
            history = strategy(history, budget, lambda messages: len(tokenize(messages)))
            prompt, after = tokenize(history), tokenize([*history, message])
            if len(after) < len(prompt):
                raise ConfigError(
                    "tokenize gives fewer tokens with a reply than before it; let it keep the prompt"
                )
            hit = hit_tokens(prompt, previous)
            call = (hit, len(prompt) - hit, len(after) - len(prompt))
            total = ReplayTokens(*(sum(pair) for pair in zip(total, call, strict=True)))
            previous = after
        history.append(message)
    return total


def hit_tokens(prompt: Sequence[int], cached: Sequence[int]) -> int:
    """How many of a prompt's tokens a cache of another sequence has: whole blocks, never the last token."""
    longest = min(len(prompt) - 1, len(cached)) // BLOCK_TOKENS * BLOCK_TOKENS
    for start in range(0, longest, BLOCK_TOKENS):
        block = slice(start, start + BLOCK_TOKENS)
        if prompt[block] != cached[block]:
            return start
    return max(0, longest)
