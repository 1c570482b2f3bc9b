"""Greedy decoding of one prompt: token by token, or in one pass where the answer is known."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fulmen.data.sequences import common_start
from fulmen.modeling.cache import has_states
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
    return _write_on(model, cache, [likeliest], n_tokens, is_done)


@torch.no_grad()
def continue_on_cache(
    model: Any,
    cache: Any,
    ids_T: Tensor,
    n_tokens: int,
    is_done: Callable[[list[int]], bool],
    guess_T: Tensor | None = None,
) -> list[int]:
    """Up to `n_tokens` likeliest tokens after `ids_T`, which follow what the cache holds; it grows by all.

    guess_T: fewer tokens, that are likely written: as far as they are, they take one pass together instead
    of one each.
    """
    cache, first = read_into(model, cache, ids_T)
    written = [first]
    if guess_T is not None and first == guess_T[0] and not has_states(cache):
        written = _as_guessed(model, cache, guess_T)
        done = (n for n in range(1, len(written) + 1) if is_done(written[:n]))
        written = written[: next(done, len(written))]
    return _write_on(model, cache, written, n_tokens, is_done)


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


def _as_guessed(model: Any, cache: Any, guess_T: Tensor) -> list[int]:
    """The likeliest tokens as far as they are the guessed, and the one behind, which the cache lacks."""
    output = model(guess_T[None].to(model.device), past_key_values=cache, use_cache=True)
    guess, likeliest = guess_T.tolist(), output.logits[0].argmax(-1).tolist()
    n_right = 1 + common_start(likeliest[:-1], guess[1:])
    cache.crop(cache.get_seq_length() - (len(guess) - n_right))
    return [*guess[:n_right], likeliest[n_right - 1]]


def _write_on(
    model: Any, cache: Any, written: list[int], n_tokens: int, is_done: Callable[[list[int]], bool]
) -> list[int]:
    """`written`, of which the cache lacks the last, and what follows."""
    while len(written) < n_tokens and not is_done(written):
        cache, likeliest = read_into(model, cache, torch.tensor([written[-1]]))
        written = [*written, likeliest]
    return written
