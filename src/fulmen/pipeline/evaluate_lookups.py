"""Which look-ups an evaluation asks: how long their prompts are, how many, and with which k."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedConfig

from fulmen.data import Document, lookup_texts
from fulmen.data.conversations import conversation_format
from fulmen.errors import ConfigError, CorpusError
from fulmen.evaluation.parity.lookups import LOOKUP_VARIANTS, LookupPlan
from fulmen.evaluation.variants import FEW_TEXTS
from fulmen.modeling.families import dsa_of
from fulmen.modeling.lengths import USUAL_LENGTH, context_of
from fulmen.pipeline.reporter import Reporter
from fulmen.pipeline.settings import EvalSettings

# A usual prompt has so many times k tokens.
LENGTH_OVER_K = 8
# Prompts that are tried where the text does not fill the usual one; and the longest that nobody asked for.
SHORTEST_PROMPT, LONGEST_PROMPT = 512, 8192


class LookupSize(NamedTuple):
    """Texts; sentences of one form in each, all of which are asked for; with which k; and by which variants.

    parts: of the prompt, that a query keeps, beside the model's own k.
    """

    texts: int
    n_keys: int
    parts: tuple[int, ...]
    variants: tuple[str, ...] = LOOKUP_VARIANTS


FULL = LookupSize(8, 16, (8, 16))
QUICK = LookupSize(2, 8, (), tuple(name for name in LOOKUP_VARIANTS if name not in FEW_TEXTS))


def plan_lookups(
    settings: EvalSettings,
    config: PreTrainedConfig,
    heldout: Sequence[Document],
    tokenizer: Any,
    reporter: Reporter,
) -> LookupPlan | None:
    """What is asked; None where nothing is to be, or (said) the text fills not even a short prompt.

    Raises:
        ConfigError: a length above the model's context or too short, or a chat template that cannot ask.
        CorpusError: the text does not fill the length asked for.
    """
    if not settings.needles:
        return None
    conversation_format(tokenizer)
    size = QUICK if settings.quick else FULL
    topk, context = settings.topk or dsa_of(config).topk, context_of(config)
    documents = [one for one in heldout if not settings.kinds or one.kind in settings.kinds]
    if settings.needle_length is not None:
        _require_within(settings.needle_length, context)
        return _plan(documents, tokenizer, settings.needle_length, topk, size)
    for length in _lengths(topk, context):
        try:
            return _plan(documents, tokenizer, length, topk, size)
        except (ConfigError, CorpusError) as error:
            reporter.note(f"No look-ups in {length:,} tokens: {error}")
    return None


def _plan(
    documents: Sequence[Document], tokenizer: Any, length: int, topk: int, size: LookupSize
) -> LookupPlan:
    texts = lookup_texts(documents, tokenizer, length, size.texts, n_keys=size.n_keys)
    ks = {length // part for part in size.parts} | ({topk} if topk < length else set())
    return LookupPlan(texts, length, sorted(ks or {length // LENGTH_OVER_K}), tokenizer, size.variants)


def _lengths(topk: int, context: int | None) -> list[int]:
    """The usual length, of which k is an 8th unless it is too long; and shorter ones, each half so long."""
    usual = min(max(USUAL_LENGTH, LENGTH_OVER_K * topk), LONGEST_PROMPT)
    lengths = [min(usual, context or usual)]
    while lengths[-1] // 2 >= SHORTEST_PROMPT:
        lengths.append(lengths[-1] // 2)
    return lengths


def _require_within(length: int, context: int | None) -> None:
    if context and length > context:
        raise ConfigError(
            f"needle_length={length} exceeds the model's context of {context} tokens; use a lower one",
            arguments=["needle_length"],
        )
