"""Greedy decoding with a guess: the same tokens and the same cache as one by one."""

import pytest
import torch

from fulmen.evaluation.greedy import continue_on_cache, read_into
from fulmen.modeling.families import empty_cache
from tests.modeling.gqa.tiny_gqa import make_dense, make_dsa, random_ids

N_TOKENS = 9
PREFIX, QUESTION = random_ids(1, 40)[0], random_ids(1, 6, seed=1)[0]


@pytest.fixture(params=[8, 1000])
def model(request):
    return make_dsa(make_dense("qwen3"), request.param).eval()


def written(model, guess, is_done=lambda tokens: False):
    cache, _ = read_into(model, empty_cache(model.config, 80), PREFIX)
    tokens = continue_on_cache(model, cache, QUESTION, N_TOKENS, is_done, guess)
    return tokens, cache.get_seq_length()


@pytest.mark.parametrize("n_right", range(6))
@pytest.mark.parametrize("n_guessed", [1, 5])
def test_whatever_is_guessed_the_same_is_written(model, n_guessed, n_right):
    alone, length = written(model, None)
    assert length == len(PREFIX) + len(QUESTION) + N_TOKENS - 1
    guess = torch.tensor(alone[:n_guessed])
    guess[n_right:] = (guess[n_right:] + 1) % 97
    assert written(model, guess) == (alone, length)


@pytest.mark.parametrize("stop", range(1, N_TOKENS))
def test_what_is_done_is_done_within_a_guess(model, stop):
    alone, _ = written(model, None)
    tokens, _ = written(model, torch.tensor(alone[:6]), lambda tokens: len(tokens) >= stop)
    assert tokens == alone[:stop]


def test_a_guess_takes_one_pass(model):
    alone, _ = written(model, None)
    passes = []
    model.register_forward_hook(lambda *_: passes.append(1))
    written(model, torch.tensor(alone[:8]))
    assert len(passes) == 3
