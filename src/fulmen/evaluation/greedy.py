"""Greedy decoding of one prompt: token by token, or in one pass where the answer is known."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fulmen.data.sequences import common_start
from fulmen.modeling.lengths import PREFILL_CHUNK
from fulmen.modeling.rope_tables import are_rotated_alike, rope_for_length


@torch.no_grad()
def continue_greedily(
    model: Any, prompt_ids: Tensor, n_tokens: int, is_done: Callable[[list[int]], bool]
) -> list[int]:
    """Up to `n_tokens` likeliest tokens after a prompt, which is read in chunks."""
    with rope_for_length(model, len(prompt_ids)):
        # A stock model makes its own cache in the first pass, a converted one in its own class.
        cache, likeliest = read_into(model, None, prompt_ids)
    return _write_on(model, cache, likeliest, n_tokens, is_done)


@torch.no_grad()
def continue_on_cache(
    model: Any, cache: Any, ids_T: Tensor, n_tokens: int, is_done: Callable[[list[int]], bool]
) -> list[int]:
    """Up to `n_tokens` likeliest tokens after `ids_T`, which follow what the cache holds; it grows by all."""
    cache, likeliest = read_into(model, cache, ids_T)
    return _write_on(model, cache, likeliest, n_tokens, is_done)


@torch.no_grad()
def read_into(model: Any, cache: Any, ids_T: Tensor) -> tuple[Any, int]:
    """Read tokens behind those of a cache (None: there is none), in chunks; it, and the likeliest next."""
    for chunk_T in ids_T.split(PREFILL_CHUNK):
        ids_1T = chunk_T[None].to(model.device)
        output = model(ids_1T, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
    return cache, int(output.logits[0, -1].argmax())


@torch.no_grad()
def answer_by_forward(model: Any, prompt_ids: Tensor, answer_ids: Tensor) -> list[int]:
    """What greedy decoding writes after a prompt, up to its first token that is not the answer's.

    Up to there it has read the answer's own tokens, so that all are given at once, in one pass; token by
    token where RoPE goes by the length, and the answer would change the prompt's rotation.
    """

    def has_left(written: list[int]) -> bool:
        return written != answer_ids[: len(written)].tolist()

    if not are_rotated_alike(model, len(prompt_ids), len(prompt_ids) + len(answer_ids) - 1):
        return continue_greedily(model, prompt_ids, len(answer_ids), has_left)
    input_ids = torch.cat((prompt_ids, answer_ids[:-1]))[None].to(model.device)
    logits_TV = model(input_ids, use_cache=False, logits_to_keep=len(answer_ids)).logits[0]
    written = logits_TV[-len(answer_ids) :].argmax(-1).tolist()
    return written[: 1 + common_start(written, answer_ids.tolist())]


def _write_on(
    model: Any, cache: Any, first: int, n_tokens: int, is_done: Callable[[list[int]], bool]
) -> list[int]:
    written = [first]
    while len(written) < n_tokens and not is_done(written):
        cache, likeliest = read_into(model, cache, torch.tensor([written[-1]]))
        written.append(likeliest)
    return written
