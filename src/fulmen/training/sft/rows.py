"""Prompts with the replies to learn, as token ids, in batches of like lengths."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fulmen.errors import ConfigError
from fulmen.training.prompts import Messages, prompt_ids

IGNORED = -100
# So many batches are drawn at random, and their rows sorted by length: little padding, still mixed.
SORTED_BATCHES = 8


@dataclass(frozen=True)
class SftRow:
    """Token ids of a prompt and of the reply that is to be learned, with the token that ends it."""

    prompt: tuple[int, ...]
    reply: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.reply)


def sft_row(tokenizer: Any, messages: Messages, reply: str) -> SftRow:
    """The row of chat messages and a reply, in the chat template; without one as plain text.

    Raises ConfigError if there is no token that ends a reply, or nothing in it.
    """
    if tokenizer.eos_token_id is None:
        raise ConfigError("the tokenizer has no end-of-text token, so that no reply would end; set eos_token")
    prompt = tuple(prompt_ids(tokenizer, messages))
    words = tuple(tokenizer(reply, add_special_tokens=False)["input_ids"])
    if not prompt or not words:
        raise ConfigError(
            f"prompt {str(messages)[:60]!r} or reply {reply[:60]!r} has no tokens; leave it out"
        )
    return SftRow(prompt, (*words, tokenizer.eos_token_id))


def batches(rows: Sequence[SftRow], size: int, steps: int, seed: int) -> list[list[SftRow]]:
    """One batch a step; every row comes once before any comes again."""
    draw = random.Random(seed)
    drawn: list[SftRow] = []
    found: list[list[SftRow]] = []
    while len(found) < steps:
        while len(drawn) < SORTED_BATCHES * size:
            drawn += draw.sample(rows, len(rows))
        taken, drawn = drawn[: SORTED_BATCHES * size], drawn[SORTED_BATCHES * size :]
        taken = sorted(taken, key=len)
        part = [taken[begin : begin + size] for begin in range(0, len(taken), size)]
        draw.shuffle(part)
        found += part
    return found[:steps]


def from_first_label(inputs: dict[str, Tensor]) -> dict[str, Any]:
    """A batch whose logits are only computed from the first token on that a label needs.

    Of long prompts with short replies, the head's are most of what a step computes and stores.
    """
    labels_BT = inputs["labels"]
    first = int((labels_BT != IGNORED).any(0).int().argmax())
    # The logits of a token are for the next one's label.
    kept = labels_BT.shape[1] - max(0, first - 1)
    return {**inputs, "labels": labels_BT[:, -kept:], "logits_to_keep": kept}


def collate(rows: Sequence[SftRow], pad: int) -> dict[str, Tensor]:
    """Ids, mask and labels [B, T], padded on the right; only replies have labels."""
    length = max(map(len, rows))
    gaps = [length - len(row) for row in rows]
    ids = [[*row.prompt, *row.reply, *[pad] * gap] for row, gap in zip(rows, gaps, strict=True)]
    labels = [
        [*[IGNORED] * len(row.prompt), *row.reply, *[IGNORED] * gap]
        for row, gap in zip(rows, gaps, strict=True)
    ]
    mask = [[1] * len(row) + [0] * gap for row, gap in zip(rows, gaps, strict=True)]
    return {
        "input_ids": torch.tensor(ids),
        "attention_mask": torch.tensor(mask),
        "labels": torch.tensor(labels),
    }
