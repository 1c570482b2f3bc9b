"""Numbers of tokens: how long sequences are, how many a query keeps, how many are read at once."""

import sys

from transformers import PreTrainedConfig

# V3.2's own k at 64K and more; below that one token in 32, and never so few that the local text fills it.
SMALLEST_TOPK, LARGEST_TOPK, CONTEXT_OVER_TOPK = 256, 2048, 32
# Of a sequence that teaches an indexer: three of four queries then have more to choose from than they keep.
LENGTH_OVER_TOPK, USUAL_LENGTH = 4, 2048
# An index that was only inherited loses answers beyond this (docs/results.md).
LENGTH_OVER_UNTRAINED_TOPK = 8
# Of texts that are shorter than those served: what these lose must be felt in them.
LENGTH_OVER_SHORT_TEXT_TOPK = 16
# Of a long prompt, read at once.
PREFILL_CHUNK = 2048


def context_of(config: PreTrainedConfig) -> int | None:
    """Tokens that the model was made for; None if its config does not say."""
    return getattr(config, "max_position_embeddings", None)


def default_topk(config: PreTrainedConfig) -> int:
    """A 32nd of the model's context, within 256 and 2048 tokens, and half of it at most."""
    context = context_of(config)
    if context is None:
        return SMALLEST_TOPK
    within = max(SMALLEST_TOPK, min(LARGEST_TOPK, context // CONTEXT_OVER_TOPK))
    return max(1, min(within, context // 2))


def untrained_topk(config: PreTrainedConfig, length: int | None) -> int:
    """Where nothing is trained: an eighth of the length asked for.

    Without one, of the model's context, within the bounds of `default_topk`.
    """
    if length is not None:
        return max(1, min(length, context_of(config) or length) // LENGTH_OVER_UNTRAINED_TOPK)
    wanted = (context_of(config) or 0) // LENGTH_OVER_UNTRAINED_TOPK
    return max(default_topk(config), min(LARGEST_TOPK, wanted))


def default_length(config: PreTrainedConfig, topk: int) -> int:
    """Tokens of a sequence to calibrate on, to train on or to judge with, where nobody says how many.

    Four times k, as a sequence that is not well above k leaves nothing to select; at least 2,048, and within
    the model's context.
    """
    return usual_length(topk, context_of(config))


def usual_length(topk: int, context: int | None) -> int:
    """`default_length`, where the context is known; None: it is not."""
    return min(max(USUAL_LENGTH, LENGTH_OVER_TOPK * topk), context or sys.maxsize)


def short_text_topk(topk: int, length: int) -> int:
    """k for texts that stand for much longer ones, to train on or to try: a 16th of theirs at most."""
    return min(topk, max(1, length // LENGTH_OVER_SHORT_TEXT_TOPK))
