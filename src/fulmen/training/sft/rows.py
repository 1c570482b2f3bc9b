"""Prompts with the replies to learn, as token ids, in batches of like lengths."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fulmen.errors import ConfigError
from fulmen.training.prompts import Messages, prompt_ids
from fulmen.training.rl.scoring import Replies

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


def collate(rows: Sequence[SftRow], pad: int) -> dict[str, Tensor]:
    """Ids and labels [B, T], padded on the right; only replies have labels."""
    length = max(map(len, rows))
    gaps = [length - len(row) for row in rows]
    ids = [[*row.prompt, *row.reply, *[pad] * gap] for row, gap in zip(rows, gaps, strict=True)]
    labels = [
        [*[IGNORED] * len(row.prompt), *row.reply, *[IGNORED] * gap]
        for row, gap in zip(rows, gaps, strict=True)
    ]
    return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}


def labelled_replies(input_ids: Tensor, labels: Tensor) -> Replies:
    """What `collate` has put together, int64 [B, S] both, as prompts and replies to score."""
    has_label_BS = labels != IGNORED
    starts_B, lengths_B = has_label_BS.long().argmax(-1), has_label_BS.sum(-1)
    steps_T = torch.arange(int(lengths_B.max()), device=labels.device)
    places_BT = (starts_B[:, None] + steps_T).clamp(max=labels.shape[1] - 1)
    return Replies(input_ids, starts_B, input_ids.gather(1, places_BT), steps_T < lengths_B[:, None], None)
