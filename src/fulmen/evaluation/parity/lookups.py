"""Look-ups by generation: does the model write the answer that its text holds?

Loss hardly moves while retrieval breaks, and one forward pass over a given answer does not tell what the
model would have written. So each question is answered greedily, token by token. A text is read once for all
of its questions, by the variant that is asked.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from fulmen.data import Lookup, LookupText
from fulmen.evaluation.greedy import continue_greedily, continue_on_cache, read_into
from fulmen.evaluation.journal import Unit
from fulmen.evaluation.variants import FEW_TEXTS, VariantRunner, asks_coarse_level, splits_topk
from fulmen.modeling.cache import forgotten_after
from fulmen.modeling.families import dsa_family_for, empty_cache
from fulmen.modeling.rope_tables import are_rotated_alike, rope_for_length

LOOKUP_VARIANTS = ("dense", "key_head_oracle", "oracle", "dsa_equal", "dsa", "one_level", "window")
# Texts that the slow variants read.
FEW = 2
# Tokens that may stand around an answer: a model may say more than it was asked.
MORE_TOKENS = 14


@dataclass(frozen=True)
class LookupPlan:
    """What is asked.

    Attributes:
        texts: of `fulmen.data.lookup_texts`.
        length: tokens that a prompt may have.
        ks: numbers of tokens that a query keeps.
        tokenizer: the model's, which reads what it writes.
        variants: of those that the model has.
    """

    texts: Sequence[LookupText]
    length: int
    ks: Sequence[int]
    tokenizer: Any
    variants: Sequence[str] = LOOKUP_VARIANTS


def lookup_units(runner: VariantRunner, plan: LookupPlan) -> list[Unit]:
    """One for each text, k and variant; dense is asked once, as k is nothing to it. Task: "variant k"."""
    units = []
    for number, text in enumerate(plan.texts):
        for variant in lookup_variants(runner.model):
            if variant not in plan.variants or (variant in FEW_TEXTS and number >= FEW):
                continue
            for k in _asked_ks(runner.model, plan, variant):
                units.append(_unit(runner, plan, number, text, variant, k))
    return units


def _asked_ks(model: PreTrainedModel, plan: LookupPlan, variant: str) -> Sequence[int]:
    """One level is asked only where a coarse level is, as else it is DSA."""
    if variant == "dense":
        return [plan.length]
    if variant == "one_level":
        return [k for k in plan.ks if asks_coarse_level(model, k, plan.length)]
    return plan.ks


def lookup_variants(model: PreTrainedModel) -> list[str]:
    """Names of those that this model has."""
    absent = set() if splits_topk(model) else {"dsa_equal"}
    # The key heads of multi-head latent attention are one.
    absent |= set(FEW_TEXTS) if dsa_family_for(model.config).is_stock else set()
    return [name for name in LOOKUP_VARIANTS if name not in absent]


def _unit(
    runner: VariantRunner, plan: LookupPlan, number: int, text: LookupText, variant: str, k: int
) -> Unit:
    tokens = len(text.prefix_ids) + sum(
        len(lookup.question_ids) + _most_tokens(lookup) for lookup in text.lookups
    )

    def run() -> dict[str, Any]:
        with runner.running(variant, k, tokens, f"look-ups, {variant}, k = {k:,}"):
            written = write_answers(runner.model, text, plan.tokenizer)
        right = [is_right(answer, lookup) for answer, lookup in zip(written, text.lookups, strict=True)]
        return {"variant": variant, "k": k, "text": number, "right": right, "written": written}

    return Unit(("parity", f"{variant} {k}", plan.length, number), tokens, run)


@torch.no_grad()
def write_answers(model: PreTrainedModel, text: LookupText, tokenizer: Any) -> list[str]:
    """What the model writes for each question, greedily, up to the end of its turn or line.

    The prefix is read once into a cache; questions and answers run on top of it and are cut off again (where
    RoPE goes by the length, each prompt is read whole). The model must be in eval mode.
    """
    n_prefix = len(text.prefix_ids)
    longest = n_prefix + max(len(one.question_ids) + _most_tokens(one) for one in text.lookups)
    ends = _end_ids(model, tokenizer)

    def is_done(written: list[int]) -> bool:
        lines = tokenizer.decode(written).split("\n")
        return written[-1] in ends or any(map(_says_something, lines[:-1]))

    if are_rotated_alike(model, n_prefix, longest):
        answers = _on_one_cache(model, text, longest, is_done)
    else:
        answers = [
            continue_greedily(
                model, torch.cat((text.prefix_ids, one.question_ids)), _most_tokens(one), is_done
            )
            for one in text.lookups
        ]
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in answers]


def is_right(written: str, lookup: Lookup) -> bool:
    """Whether the answer is in the first line that says something, as a whole word."""
    line = next(filter(_says_something, written.split("\n")), "")
    return re.search(rf"(?<!\w){re.escape(lookup.answer)}(?!\w)", line) is not None


def _says_something(line: str) -> bool:
    """Not so a blank line, and one that opens a block of code."""
    return re.fullmatch(r"\s*(```\w*)?\s*", line) is None


def _on_one_cache(
    model: PreTrainedModel, text: LookupText, longest: int, is_done: Callable[[list[int]], bool]
) -> list[list[int]]:
    cache = empty_cache(model.config, longest)
    with rope_for_length(model, len(text.prefix_ids)):
        read_into(model, cache, text.prefix_ids)
    answers = []
    for one in text.lookups:
        most, guess_T = _most_tokens(one), one.answer_ids
        with forgotten_after(cache):
            answers.append(continue_on_cache(model, cache, one.question_ids, most, is_done, guess_T))
    return answers


def _most_tokens(lookup: Lookup) -> int:
    return len(lookup.answer_ids) + MORE_TOKENS


def _end_ids(model: PreTrainedModel, tokenizer: Any) -> set[int]:
    """Tokens that end a turn: the model's, and the tokenizer's."""
    own = getattr(model.generation_config, "eos_token_id", None)
    return {*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id} - {None}
