"""What the engine says of its replies, against the model."""

import pytest
import torch

from fulmen.errors import RolloutError
from fulmen.modeling.rollouts import Sampling
from fulmen.training.rl.generate_engine import GenerateRollouts
from fulmen.training.rl.weights import policy_weights
from fulmen.training.sparse.lora import add_lora, merge_lora
from tests.modeling.gqa.tiny_gqa import make_dense, make_dsa, random_ids

PROMPTS = [random_ids(1, length, seed=length)[0].tolist() for length in (12, 5, 17)]
ENDS = list(range(2, 8))


def engine(model=None, at_once=64):
    return GenerateRollouts(make_dsa(make_dense(), topk=8) if model is None else model, ENDS, 0, at_once)


def rescored(model, prompt, rollout, temperature=1.0):
    """Log-probabilities of all tokens before each of the reply's, in one pass without padding."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *rollout.tokens]])).logits[0]
    return (logits[len(prompt) - 1 : -1] / temperature).log_softmax(-1)


@pytest.mark.parametrize("sampling", [Sampling(3, 8, 0.8, 0.9, 16, seed=5), Sampling(3, 8, seed=5)])
def test_log_probabilities_are_the_models_over_what_was_kept(sampling):
    asked = engine()
    found = asked.generate(PROMPTS, sampling)
    assert [one.prompt for one in found] == [0] * 3 + [1] * 3 + [2] * 3
    assert {one.ended for one in found} == {True, False}
    for one in found:
        logp = rescored(asked.model, PROMPTS[one.prompt], one, sampling.temperature)
        assert one.ended == (one.tokens[-1] in ENDS)
        assert not set(one.tokens[:-1]) & set(ENDS)
        for step, token in enumerate(one.tokens):
            ids = list(range(logp.shape[-1])) if one.kept is None else list(one.kept[step])
            within = logp[step, ids].log_softmax(-1)
            assert one.logprobs[step] == pytest.approx(float(within[ids.index(token)]), abs=2e-5)


def test_the_kept_are_the_smallest_set_that_reaches_top_p():
    asked, sampling = engine(), Sampling(2, 6, 1.0, 0.7, 40, seed=1)
    for one in asked.generate(PROMPTS, sampling):
        assert len(one.kept) == len(one.tokens)
        logp = rescored(asked.model, PROMPTS[one.prompt], one)
        for step, ids in enumerate(one.kept):
            best = logp[step].topk(40)
            shares = best.values.softmax(-1)
            reaching = int((shares.cumsum(-1) < 0.7).sum()) + 1
            assert set(ids) == set(best.indices[:reaching].tolist())


def test_the_same_seed_gives_the_same_replies_and_touches_no_other_random_choice():
    first = engine()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    asked = first.generate(PROMPTS, Sampling(2, 6, seed=1))
    assert torch.equal(torch.get_rng_state(), state)
    assert engine().generate(PROMPTS, Sampling(2, 6, seed=1)) == asked
    assert engine().generate(PROMPTS, Sampling(2, 6, seed=2)) != asked


def test_one_kept_token_is_the_likeliest_whatever_is_written_beside_it():
    asked = engine(at_once=2).generate(PROMPTS, Sampling(1, 6, top_k=1))
    alone = [engine().generate([prompt], Sampling(1, 6, top_k=1))[0].tokens for prompt in PROMPTS]
    assert [one.tokens for one in asked] == alone


def test_the_models_own_settings_have_no_part_and_stay():
    model = make_dsa(make_dense(), topk=8)
    expected = engine(model).generate(PROMPTS, Sampling(1, 6, seed=1))
    model.generation_config.repetition_penalty, model.generation_config.max_length = 5.0, 3
    model.train()
    assert engine(model).generate(PROMPTS, Sampling(1, 6, seed=1)) == expected
    assert model.generation_config.repetition_penalty == 5.0
    assert model.training


def test_weights_come_merged_and_under_the_models_names():
    model = make_dsa(make_dense("llama3-rope"), topk=8)
    names = set(model.state_dict())
    add_lora(model, 4, 0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    weights = dict(policy_weights(model))
    asked = engine(model)
    asked.update(weights.items())
    merge_lora(model)
    assert set(weights) == names
    # Tied to the embeddings, and passed all the same.
    assert "lm_head.weight" in weights
    for name, tensor in model.state_dict().items():
        assert torch.allclose(weights[name], tensor, atol=1e-6), name
    with pytest.raises(RolloutError, match=r"weights of another model .* lm_head\.weight"):
        asked.update((name, tensor) for name, tensor in weights.items() if name != "lm_head.weight")


def test_top_p_needs_a_top_k():
    with pytest.raises(RolloutError, match=r"top_p=0\.9 needs a top_k"):
        engine().generate(PROMPTS, Sampling(1, 2, top_p=0.9))
