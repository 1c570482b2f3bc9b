"""The gap between the policy that samples and the one that is trained, on rollouts written by hand."""

import pytest
import torch

from fulmen.errors import ConfigError
from fulmen.modeling.rollouts import Rollout
from fulmen.pipeline.rollout_gap import logprob_gap, own_selections, rollout_logprobs
from tests.modeling.gqa.tiny_gqa import make_dense, pair, random_ids

PROMPT, TOKENS = random_ids(1, 9)[0].tolist(), (5, 70, 5)
KEPT = ((5, 6, 40), (70,), (3, 4, 5, 90))
TOPK = 8


def rollout(logprobs=(0.0, 0.0, 0.0), kept=KEPT):
    return Rollout(0, TOKENS, logprobs, kept, ended=False)


def by_hand(model, temperature, kept):
    """Log-probabilities of the tokens among those that are kept."""
    with torch.no_grad():
        logits_TV = model(torch.tensor([[*PROMPT, *TOKENS]])).logits[0] / temperature
    rows = logits_TV[len(PROMPT) - 1 : -1]
    every = range(rows.shape[1])
    found = []
    for place, (row, token) in enumerate(zip(rows, TOKENS, strict=True)):
        among = [row[other] for other in (kept[place] if kept else every)]
        found.append(row[token] - torch.stack(among).exp().sum().log())
    return torch.stack(found)


@pytest.mark.parametrize("kept", [KEPT, None])
def test_logprobs_are_over_the_kept_tokens(kept):
    for model in pair("llama", TOPK):
        found_N = rollout_logprobs(model, PROMPT, rollout(kept=kept), 0.7)
        torch.testing.assert_close(found_N, by_hand(model, 0.7, kept), rtol=0, atol=1e-5)


def test_the_gap_is_that_of_the_tokens():
    dense, model = pair("llama", TOPK)
    right_N = by_hand(model, 1.0, KEPT)
    exact = logprob_gap(model, [PROMPT], [rollout(tuple(right_N.tolist()))])
    assert (exact.tokens, exact.largest < 1e-5) == (3, True)
    one_off = tuple((right_N - torch.tensor([0.0, 0.0, 0.3])).tolist())
    gap = logprob_gap(model, [PROMPT, PROMPT], [rollout(one_off)] * 2)
    assert gap.tokens == 6
    assert gap.mean == pytest.approx(0.1, abs=1e-5)
    assert gap.largest == pytest.approx(0.3, abs=1e-5)
    assert logprob_gap(dense, [PROMPT], [rollout(tuple(right_N.tolist()))]).mean > 1e-2


def test_own_selections_are_of_the_queries_that_see_more_than_k_keys():
    model = pair("llama", TOPK)[1]
    tokens = random_ids(1, 20)[0].tolist()
    found = own_selections(model, tokens)
    assert sorted(found) == [0, 1, 2]
    for topk_TK in found.values():
        assert topk_TK.shape == (20 - TOPK, TOPK)
        for position, chosen in enumerate(topk_TK.tolist(), TOPK):
            assert len(set(chosen)) == TOPK
            assert 0 <= min(chosen) <= max(chosen) <= position
    assert own_selections(model, tokens[:TOPK]) == {}
    with pytest.raises(ConfigError, match="has no DSA layer; convert it with fulmen first"):
        own_selections(make_dense("llama"), tokens)
