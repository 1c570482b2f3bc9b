"""Scores over kept tokens, against a softmax of the model's own logits."""

import pytest
import torch

from fulmen.training.rl.scoring import (
    behind_prompts,
    head_of,
    kept_logprobs,
    kept_mass,
    let_score,
    score_replies,
)
from tests.modeling.gqa.tiny_gqa import VOCAB, make_dense, random_ids

TEMPERATURE = 0.7


def batch(kept=True):
    """Prompts of 3 and 5 tokens padded on the left, replies of 4 and 2 padded on the right."""
    prompt_ids, completion_ids = random_ids(2, 5), random_ids(2, 4, seed=1)
    prompt_mask = torch.tensor([[0, 0, 1, 1, 1], [1] * 5])
    completion_mask = torch.tensor([[1] * 4, [1, 1, 0, 0]])
    kept_BTK = None
    if kept:
        others = torch.stack([torch.randperm(VOCAB)[:7] for _ in range(8)]).view(2, 4, 7)
        others = others.where(others != completion_ids[..., None], -1)
        kept_BTK = torch.cat([others, completion_ids[..., None]], -1)
    return behind_prompts(prompt_ids, prompt_mask, completion_ids, completion_mask, kept_BTK)


def logits_of(model, replies, row):
    """Of the positions that predict a row's reply, by the model's own head, one row by itself."""
    length = int(replies.counts_BT[row].sum())
    start = int(replies.starts_B[row])
    logits = model(input_ids=replies.input_ids[row : row + 1, : start + length]).logits[0]
    return logits[start - 1 : start + length - 1] / TEMPERATURE


@pytest.mark.parametrize("name", ["llama", "gemma2", "granite", "cohere2"])
@pytest.mark.parametrize("kept", [True, False])
def test_scores_are_those_of_the_models_logits(name, kept):
    """Capped, scaled and plain heads; a reply's padding is not there."""
    torch.manual_seed(0)
    model, replies = make_dense(name), batch(kept)
    let_score(model, TEMPERATURE)
    with torch.no_grad():
        found = model(scored=replies)
    for row in range(2):
        logits = logits_of(model, replies, row)
        if kept:
            mask = torch.zeros(logits.shape, dtype=torch.bool)
            for step, ids in enumerate(replies.kept_BTK[row][: len(logits)]):
                mask[step, ids[ids >= 0]] = True
            logits = logits.masked_fill(~mask, -torch.inf)
        logp = logits.log_softmax(-1)
        tokens = replies.tokens_BT[row][: len(logits), None]
        assert torch.allclose(found.logp_BT[row, : len(logits)], logp.gather(1, tokens)[:, 0], atol=2e-5)
        entropy = torch.distributions.Categorical(logits=logits).entropy()
        assert torch.allclose(found.entropy_BT[row, : len(logits)], entropy, atol=2e-5)
    assert (found.logp_BT[~replies.counts_BT] == 0).all()


def test_what_a_model_was_told_is_read_and_not_scored():
    model, prompt_ids, completion_ids = make_dense("llama"), random_ids(1, 5), random_ids(1, 6, seed=1)
    told_BT = torch.tensor([[False, False, True, True, False, False]])
    masks = torch.ones_like(prompt_ids), torch.ones_like(completion_ids)
    whole, own = (
        behind_prompts(prompt_ids, masks[0], completion_ids, masks[1], None, told_BT=told)
        for told in (None, told_BT)
    )
    with torch.no_grad():
        all_scores, found = (score_replies(model, replies, 1.0).logp_BT for replies in (whole, own))
    assert (own.counts_BT == ~told_BT).all()
    assert torch.equal(found, all_scores.masked_fill(told_BT, 0))


def test_only_the_kept_rows_of_the_head_have_a_gradient():
    model, replies = make_dense("llama").requires_grad_(True), batch()
    score_replies(model, replies, 1.0).logp_BT.sum().backward()
    touched = model.lm_head.weight.grad.abs().sum(-1) > 0
    kept = replies.kept_BTK[replies.counts_BT].unique()
    assert set(touched.nonzero()[:, 0].tolist()) <= set(kept.tolist()) - {-1}


def test_the_kept_mass_is_their_share_of_the_whole():
    model = make_dense("llama")
    head, hidden = head_of(model, 1.0), torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    kept = torch.tensor([[3, 5, -1], [0, 1, 2], [96, -1, -1]])
    shares = model.lm_head(hidden).softmax(-1)
    expected = [shares[row, ids[ids >= 0]].sum() for row, ids in enumerate(kept)]
    assert torch.allclose(kept_mass(head, hidden, kept), torch.stack(expected), atol=1e-6)


def test_a_token_that_was_not_kept_is_impossible():
    model = make_dense("llama")
    logp, _ = kept_logprobs(head_of(model, 1.0), torch.ones(1, 64), torch.tensor([4]), torch.tensor([[3, 5]]))
    assert logp.item() == -torch.inf
