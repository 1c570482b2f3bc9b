"""Runs of reinforcement learning: what they learn, write down, refuse and resume."""

import copy
import math
import os
from dataclasses import replace

import pytest
import torch

from fulmen.errors import ConfigError, RolloutError
from fulmen.tasks.base import HELD_OUT, Score
from fulmen.training.beginnings import hidden_states
from fulmen.training.rl import scoring
from fulmen.training.rl.generate_engine import GenerateRollouts
from fulmen.training.rl.prompts import prompt_tokens
from fulmen.training.rl.run import train_rl
from fulmen.training.rl.settings import Domain
from tests.modeling.gqa.test_coarse import two_level_model
from tests.modeling.gqa.tiny_gqa import make_dense
from tests.training.forks import run_killed, run_two_processes
from tests.training.rl import tiny_rl
from tests.training.rl.tiny_rl import (
    KILLED,
    TOKENIZER,
    Graded,
    LowWords,
    fresh_model,
    generate_engine,
    metric_rows,
    quick,
    run,
)

FIELDS = {"step", "reward", "kl", "masked_share", "kept_mass", "engine_trainer_gap"}
FIELDS |= {"reward_lenient", "length", "entropy", "ratio", "learning_rate", "constant_groups", "by_task"}


def equal_weights(one, other) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(first, second) for first, second in pairs)


def test_a_run_learns_what_is_rewarded_and_writes_down_how(tmp_path):
    first = fresh_model()
    larger = {"prompts": 4, "group": 8, "micro_batch": 16, "lora": 16, "learning_rate": 3e-2}
    model, result = run(tmp_path, steps=8, **larger)
    rows = metric_rows(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert all(set(row) >= FIELDS for row in rows)
    assert rows[-1]["reward"] > rows[0]["reward"] + 0.3, [row["reward"] for row in rows]
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert rows[-1]["kl"] > 0.01
    for row in rows:
        assert row["engine_trainer_gap"] < 1e-5
        # Right after an update engine and policy are one: over the kept set, though not over all tokens.
        assert row["ratio"] == pytest.approx(1, abs=0.005)
        assert 0.5 < row["kept_mass"] <= 1
        assert row["masked_share"] == 0
    assert rows[0]["kept_mass"] < 0.97
    print(
        "mean ratio with the sampling mask, and without:", [(row["ratio"], row["kept_mass"]) for row in rows]
    )
    assert [row | {"seconds": 0} for row in result.rows] == [row | {"seconds": 0} for row in rows]
    assert len(result.before["low"]) == len(result.after["low"]) == 3
    # Adapters are merged, indexers were frozen, settings are the model's own again.
    assert set(model.state_dict()) == set(first.state_dict())
    changed = {
        name
        for (name, one), other in zip(model.state_dict().items(), first.state_dict().values(), strict=True)
        if not torch.equal(one, other)
    }
    assert changed
    assert not any(".indexer." in name or "embed" in name or "norm" in name for name in changed)
    assert model.config.to_dict() == first.config.to_dict()
    assert not model.training


def test_the_prompt_of_a_group_is_read_once(tmp_path, monkeypatch):
    """By the reference and by the policy: groups are not torn apart."""
    begins = []

    def noting(*args):
        hidden, begins_B = hidden_states(*args)
        begins.append(set(begins_B.tolist()))
        return hidden, begins_B

    monkeypatch.setattr(scoring, "hidden_states", noting)
    run(tmp_path, steps=1)
    # All but its last token.
    read = [len(prompt_tokens(TOKENIZER, Graded().problem(index))) - 1 for index in (0, 1)]
    assert sorted(begins, key=sum) == sorted([{one} for one in (*read, *read)], key=sum)


def test_prompts_of_like_lengths_share_a_pass(tmp_path, monkeypatch):
    widths = []

    def noting(model, ids_BS, *args):
        widths.append(ids_BS.shape[1])
        return hidden_states(model, ids_BS, *args)

    monkeypatch.setattr(scoring, "hidden_states", noting)
    lengths = [len(prompt_tokens(TOKENIZER, Graded().problem(index))) for index in range(6)]
    assert lengths != sorted(lengths)
    run(tmp_path, steps=1, prompts=6)
    reference, policy = widths[:6], widths[6:]
    # Six tokens are written behind each at most.
    assert reference == policy == sorted(reference)
    assert all(0 < width - length <= 6 for width, length in zip(policy, sorted(lengths), strict=True))


@pytest.mark.parametrize("weight", [0.25, 1.0])
def test_a_reply_that_was_cut_counts_for_less(weight, tmp_path):
    class Anything(LowWords):
        def score(self, problem, reply):
            return Score(1.0, 1.0)

    run(tmp_path, domains=[Domain(Anything())], steps=1, prompts=16, max_new_tokens=24, cut_weight=weight)
    (row,) = metric_rows(tmp_path)
    assert 0 < row["ended"] < 1
    assert row["reward"] == pytest.approx(row["ended"] + weight * (1 - row["ended"]))
    assert row["reward_lenient"] == 1


def test_a_killed_run_goes_on_to_the_same_curve(tmp_path):
    run_killed(tiny_rl.run_until_killed, [(str(tmp_path / "killed"),)])
    assert len(metric_rows(tmp_path / "killed")) == 3
    resumed, _ = run(tmp_path / "killed", **KILLED)
    whole, _ = run(tmp_path / "whole", **KILLED)
    assert metric_rows(tmp_path / "killed") == metric_rows(tmp_path / "whole")
    assert equal_weights(resumed, whole)
    # Nothing is left to do.
    again, _ = run(tmp_path / "killed", **KILLED)
    assert equal_weights(again, whole)


def test_an_engine_with_other_log_probabilities_is_an_error(tmp_path):
    with pytest.raises(RolloutError, match=r"differ by 0\.01 nats a token .* before step 1, more than 1e-04"):
        run(tmp_path, engine=tiny_rl.stale_engine)


def test_the_engine_is_given_each_steps_weights(tmp_path):
    given = []

    class Watched(GenerateRollouts):
        def update(self, weights):
            given.append({name: tensor.clone() for name, tensor in weights})
            super().update(given[-1].items())

    model, _ = run(tmp_path, engine=lambda model: generate_engine(model, Watched), steps=2)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert len(given) == 3
    assert not torch.equal(given[0][name], given[1][name])
    assert torch.allclose(given[2][name], model.state_dict()[name], atol=1e-6)


def test_several_updates_on_one_call_leave_the_policy_behind(tmp_path):
    asked = []

    class Watched(Graded):
        def problem(self, index):
            asked.append(index)
            return super().problem(index)

    run(tmp_path, domains=[Domain(Watched())], steps=3, updates=2, learning_rate=0.1, off_policy=0.01)
    # The second call's problems are others, though its second step is not taken.
    assert [index for index in asked if index < HELD_OUT] == list(range(8))
    rows = metric_rows(tmp_path)
    assert [abs(row["ratio"] - 1) < 0.005 for row in rows] == [True, False, True]
    assert rows[0]["masked_share"] == rows[2]["masked_share"] == 0
    assert max(row["masked_share"] for row in rows) > 0


def test_all_weights_of_a_dense_model(tmp_path):
    first = make_dense("gemma2")
    model, _ = run(tmp_path, copy.deepcopy(first), lora=None, learning_rate=1e-3, top_p=1.0, top_k=0)
    assert metric_rows(tmp_path)[-1]["kept_mass"] == 1
    assert metric_rows(tmp_path)[-1]["kl"] > 0
    moved = [
        not torch.equal(one, other) for one, other in zip(model.parameters(), first.parameters(), strict=True)
    ]
    assert all(moved)


def test_weights_of_16_bits_are_trained_in_float32_or_under_autocast(tmp_path):
    for name, more in (("float32", {}), ("bf16", {"bf16": True})):
        # Of small weights: else a random model's selections and logits jump with its rounding.
        model = make_dense("llama", torch.bfloat16, initializer_range=0.05)
        first = copy.deepcopy(model)

        def engine(policy, more=more):
            return generate_engine(policy, **more)

        run(tmp_path / name, model, engine=engine, steps=1, learning_rate=3e-2, **more)
        assert {tensor.dtype for tensor in model.parameters()} == {torch.bfloat16}
        assert not equal_weights(model, first)
    gaps = [metric_rows(tmp_path / name)[0]["engine_trainer_gap"] for name in ("float32", "bf16")]
    assert gaps[0] < 1e-5 < gaps[1] < 2e-2


def test_a_coarse_index_of_16_bits_is_computed_with_in_float32(tmp_path):
    """Its weights are buffers."""
    model = two_level_model().bfloat16()
    run(tmp_path, model, steps=1)
    kinds = {tensor.dtype for tensor in model.state_dict().values() if tensor.is_floating_point()}
    assert kinds == {torch.bfloat16}
    assert metric_rows(tmp_path)[0]["engine_trainer_gap"] < 1e-5


def test_indexers_can_be_trained_by_their_own_loss(tmp_path):
    first = fresh_model()
    model, _ = run(tmp_path, indexer="trained", indexer_learning_rate=1e-2)
    assert metric_rows(tmp_path)[0]["indexer_loss"] > 0
    moved = {
        name: not torch.equal(one, other)
        for (name, one), other in zip(model.named_parameters(), first.parameters(), strict=True)
    }
    assert all(moved[name] for name in moved if ".indexer." in name and name.endswith("weight"))


class Broken(LowWords):
    """Raises for some, is NaN for others."""

    def score(self, problem, reply):
        if problem.index == HELD_OUT:
            raise KeyError("no such word")
        return Score(math.nan, 0.0) if problem.index % 2 else Score(0.0, 0.5)


class Solved(LowWords):
    def score(self, problem, reply):
        return Score(1.0, 1.0)


def test_what_is_wrong_with_rewards_is_said_and_counted(tmp_path):
    said = []
    domains = [Domain(Broken("broken"), 0.0), Domain(Solved("solved"), 0.01)]
    model, result = run(tmp_path, domains=domains, note=said.append, steps=10)
    rows = metric_rows(tmp_path)
    assert [row["failed_rewards"] for row in rows] == [0, 4] * 5
    assert all(row["constant_groups"] == row["groups"] == 2 for row in rows)
    assert rows[1]["by_task"]["broken"]["reward"] is None
    assert rows[1]["by_task"]["solved"]["reward"] == rows[1]["reward"] == 1
    assert result.before["broken"] == [[0.0, 0.0], [0.0, 0.0], [0.0, 0.5]]
    assert len(said) == 3
    assert "scoring problem 1000000000 raised KeyError" in said[0]
    assert "broken taught nothing in 10 steps: no reply was right" in said[1]
    assert "solved taught nothing in 10 steps: every reply was right" in said[2]
    # Nothing was better than its group, and where the policy is the reference the KL has no gradient.
    assert all(
        torch.allclose(a, b, atol=1e-6)
        for a, b in zip(model.parameters(), fresh_model().parameters(), strict=True)
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"group": 1}, "group=1 cannot be compared with itself"),
        ({"micro_batch": 3}, "micro_batch=3 does not divide a step's 8 replies"),
        ({"top_p": 0.9, "top_k": 0}, "top_p=0.9 needs a top_k"),
        ({"top_p": 1.5}, "top_p=1.5 cannot be"),
        ({"temperature": 0.0}, "temperature=0.0 cannot be"),
        ({"indexer": "half"}, "indexer='half' is not known"),
        ({"steps": 0}, "steps=0"),
    ],
)
def test_settings_that_cannot_be(changes, words):
    with pytest.raises(ConfigError) as caught:
        quick(**changes)
    assert words in str(caught.value)


def test_what_does_not_fit_is_said_before_any_work(tmp_path):
    twice = [Domain(Graded()), Domain(LowWords())]
    for model, domains, changes, words in [
        (fresh_model(), twice, {}, r"tasks=\['low', 'low'\]"),
        (fresh_model(), [], {}, r"tasks=\[\]"),
        (make_dense(), twice[:1], {"indexer": "trained"}, "needs a model with DSA"),
    ]:
        with pytest.raises(ConfigError, match=words):
            train_rl(model, TOKENIZER, domains, generate_engine, tmp_path, replace(quick(), **changes))


@pytest.mark.skipif("FULMEN_SLOW_TESTS" not in os.environ, reason="a minute; FULMEN_SLOW_TESTS=1 runs it")
def test_two_processes_share_the_prompts(tmp_path):
    run_two_processes(tiny_rl.run_in_processes, (str(tmp_path),), "--cpu")
    rows = metric_rows(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3]
    # Of both: the log has the replies of all prompts.
    assert all(row["groups"] == 4 for row in rows)
    assert all(row["tokens"] == pytest.approx(16 * row["length"]) for row in rows)
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert rows[2]["kl"] > 1e-3
    assert all(row["engine_trainer_gap"] < 1e-5 for row in rows)
