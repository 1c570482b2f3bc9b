"""Evaluation of models whose RoPE goes by the length of the text: as one who reads every prompt whole."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fulmen.config import DsaConfig
from fulmen.evaluation import greedy
from fulmen.evaluation.parity.needles import NeedleSample, score_by_forward, score_samples
from fulmen.evaluation.suites.responders import LocalResponder
from fulmen.modeling.families import family_for_type
from tests.evaluation.parity.tiny_parity import random_ids

ORIGINAL, ROOMY = 64, 256
LONGROPE = {
    "rope_type": "longrope",
    "original_max_position_embeddings": ORIGINAL,
    "factor": 4.0,
    "short_factor": [1.0] * 6,
    "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
}
ROPES = {"longrope": (LONGROPE, 256), "dynamic": ({"rope_type": "dynamic", "factor": 2.0}, ORIGINAL)}


def make_models(rope):
    """A converted model with k above every length, and as many dense ones as are asked for, all fresh."""
    values, context = ROPES[rope]

    def dense():
        torch.manual_seed(0)
        shape = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 97}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
        rope_parameters = {"rope_theta": 10000.0, **values}
        config = LlamaConfig(
            **shape, **heads, rope_parameters=rope_parameters, max_position_embeddings=context
        )
        return LlamaForCausalLM(config).eval()

    return family_for_type("llama").from_dense(dense(), DsaConfig(ROOMY, 4, 2, 8, (0, 1))), dense


def greedy_answer(dense, prompt_ids, count):
    """What a dense model that has read nothing before writes."""
    written = dense().generate(prompt_ids[None], max_new_tokens=count, do_sample=False, eos_token_id=None)
    return written[0, len(prompt_ids) :]


@pytest.mark.parametrize("rope", ROPES)
def test_continuations_are_those_of_a_fresh_dense_model(rope, monkeypatch):
    monkeypatch.setattr(greedy, "PREFILL_CHUNK", 16)
    model, dense = make_models(rope)
    for source in (None, dense()):
        responder = LocalResponder(model, None, source=source)
        # The longest first: what it leaves in the tables must not reach the next.
        for length in (110, 80, ORIGINAL - 4, 20):
            prompt_ids = random_ids(length, seed=length)
            expected = greedy_answer(dense, prompt_ids, 8).tolist()
            assert responder.continue_text(prompt_ids, 8, "dense") == expected
            assert responder.continue_text(prompt_ids, 8, "dsa") == expected


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("shared", [30, ORIGINAL - 8, ORIGINAL + 20])
def test_needles_are_scored_as_greedy_decoding_writes(rope, shared):
    model, dense = make_models(rope)
    group = []
    for number in range(6):
        prompt_ids = torch.cat([random_ids(shared), random_ids(3 + number, 7 + number)])
        answer_ids = greedy_answer(dense, prompt_ids, 3)
        answer_ids[2] = (answer_ids[2] + number % 2) % 97
        group.append(NeedleSample(prompt_ids, answer_ids, "", 0.5, 70, 6, text=3))
    assert [score_by_forward(model, sample) for sample in group] == [True, False] * 3
    assert score_samples(model, group) == [True, False] * 3


@pytest.mark.parametrize("rope", ROPES)
def test_losses_do_not_go_by_what_was_read_before(rope):
    model, dense = make_models(rope)
    responder = LocalResponder(model, None)
    ids = {length: random_ids(length) for length in (100, 70)}
    for length, ids_T in ids.items():
        fresh = LocalResponder(dense(), None).losses(ids_T, "dense")
        torch.testing.assert_close(
            responder.losses(ids_T, "dense"), fresh, rtol=1e-4, atol=1e-4, msg=str(length)
        )
