"""Selection strategies: what they are given, and that they leave nothing behind."""

import pytest
import torch

from fulmen import ConfigError
from fulmen.modeling.gqa.attention import project_normed_heads
from fulmen.modeling.gqa.cache import DsaCache
from fulmen.modeling.selectors import DenseSelector, IndexerSelector, Selector, dsa_attentions, use_selector
from fulmen.ops.common.index_keys import SCALE_BYTES, pack_index_keys
from fulmen.ops.common.rope import apply_rope
from fulmen.ops.scores import index_scores
from tests.modeling.gqa.tiny_gqa import make_dense, make_dsa, random_ids

TOPK, LENGTH = 6, 15


class Recorder(IndexerSelector):
    def __init__(self):
        self.calls = []

    def select(self, inputs, topk):
        chosen = super().select(inputs, topk)
        self.calls.append((inputs, topk, chosen))
        return chosen


class Everything(Selector):
    """Asked at every length; answers with no selection."""

    asked = 0

    def is_needed(self, n_keys, topk):
        return True

    def select(self, inputs, topk):
        self.asked += 1


@pytest.fixture
def model():
    return make_dsa(make_dense("qwen3"), TOPK)


def run(model, ids, **kwargs):
    with torch.no_grad():
        return model(ids, **kwargs).logits


def test_inputs_are_full_width_and_positioned(model):
    cache, recorder, ids = DsaCache(model.config), Recorder(), random_ids(2, LENGTH)
    run(model, ids[:, :11], past_key_values=cache)
    with use_selector(model, recorder):
        run(model, ids[:, 11:], past_key_values=cache)
    assert [inputs.layer_idx for inputs, *_ in recorder.calls] == [0, 1, 2]
    inputs, topk, chosen = recorder.calls[1]
    assert topk == TOPK
    assert inputs.index_q_BTJE.shape == (2, 4, 4, 8)
    assert inputs.index_k_BSIE.shape == (2, LENGTH, 2, 8 + SCALE_BYTES)
    assert inputs.index_k_BSIE.dtype == torch.int8
    assert inputs.index_w_BTJ.shape == inputs.index_b_BTJ.shape == (2, 4, 4)
    assert inputs.q_BTHD.shape == (2, 4, 4, 24)
    assert inputs.k_BSGD.shape == inputs.v_BSGV.shape == (2, LENGTH, 2, 24)
    assert inputs.scale == 24**-0.5
    assert inputs.start_BT.tolist() == [[0] * 4] * 2
    assert inputs.stop_BT.tolist() == [[12, 13, 14, 15]] * 2
    assert chosen.shape == (2, 4, TOPK)


def test_index_inputs_come_from_the_hidden_state_and_the_heads_before_rope(model):
    recorder, seen = Recorder(), []

    def remember(module, args, kwargs):
        seen.append(kwargs)

    hooks = [a.register_forward_pre_hook(remember, with_kwargs=True) for a in dsa_attentions(model)]
    with use_selector(model, recorder):
        run(model, random_ids(2, LENGTH))
    for hook in hooks:
        hook.remove()
    for attention, kwargs, (inputs, *_) in zip(dsa_attentions(model), seen, recorder.calls, strict=True):
        x_BTC, (cos_BTR, sin_BTR) = kwargs["hidden_states"], kwargs["position_embeddings"]
        with torch.no_grad():
            q_BTHD, k_BTGD, v_BTGD = project_normed_heads(attention, x_BTC)
            expected = attention.indexer(x_BTC, q_BTHD, k_BTGD, cos_BTR, sin_BTR)
        expected = expected._replace(k_BTIE=pack_index_keys(expected.k_BTIE))
        got = (inputs.index_q_BTJE, inputs.index_k_BSIE, inputs.index_w_BTJ, inputs.index_b_BTJ)
        assert all(map(torch.equal, got, expected))
        assert torch.equal(inputs.q_BTHD, apply_rope(q_BTHD, cos_BTR, sin_BTR))
        assert torch.equal(inputs.k_BSGD, apply_rope(k_BTGD, cos_BTR, sin_BTR))
        assert torch.equal(inputs.v_BSGV, v_BTGD)


def test_default_keeps_the_largest_index_scores(model):
    recorder = Recorder()
    with use_selector(model, recorder):
        run(model, random_ids(1, LENGTH))
    for inputs, _, chosen in recorder.calls:
        scores_BTS = index_scores(
            inputs.index_q_BTJE,
            inputs.index_k_BSIE,
            inputs.index_w_BTJ,
            inputs.index_b_BTJ,
            inputs.start_BT,
            inputs.stop_BT,
        )
        for t in range(LENGTH):
            kept = {s for s in chosen[0, t].tolist() if s >= 0}
            assert len(kept) == min(t + 1, TOPK)
            dropped = set(range(t + 1)) - kept
            if dropped:
                assert scores_BTS[0, t, list(kept)].min() >= scores_BTS[0, t, list(dropped)].max()


def test_the_chosen_keys_are_invariant_to_the_way_of_feeding(model):
    ids, whole, stepwise = random_ids(1, LENGTH), Recorder(), Recorder()
    with use_selector(model, whole):
        run(model, ids)
    cache = DsaCache(model.config)
    with use_selector(model, stepwise):
        for t in range(LENGTH):
            run(model, ids[:, t : t + 1], past_key_values=cache)
    last = [chosen[0, -1] for *_, chosen in whole.calls]
    assert all(torch.equal(a, b[0, 0]) for a, (*_, b) in zip(last, stepwise.calls[-3:], strict=True))


def test_no_scoring_while_topk_covers_the_text(model):
    recorder = Recorder()
    with use_selector(model, recorder):
        run(model, random_ids(1, TOPK))
    assert recorder.calls == []


def test_a_strategy_may_ask_for_short_texts_and_answer_everything(model):
    ids, strategy = random_ids(1, LENGTH), Everything()
    with use_selector(model, DenseSelector()):
        expected = run(model, ids)
    with use_selector(model, strategy):
        assert torch.equal(run(model, ids), expected)
        run(model, ids[:, :2])
    assert strategy.asked == 6


def test_the_selector_is_removed_even_after_an_error(model):
    before = [attention.selector for attention in dsa_attentions(model)]
    with pytest.raises(KeyError), use_selector(model, DenseSelector()):  # noqa: PT012
        with use_selector(model, Everything()):
            assert all(isinstance(attention.selector, Everything) for attention in dsa_attentions(model))
        assert all(isinstance(attention.selector, DenseSelector) for attention in dsa_attentions(model))
        raise KeyError
    assert [attention.selector for attention in dsa_attentions(model)] == before


def test_a_dense_model_takes_no_selector():
    with (
        pytest.raises(ConfigError, match="LlamaForCausalLM has no DSA layer"),
        use_selector(make_dense("llama"), DenseSelector()),
    ):
        pass
