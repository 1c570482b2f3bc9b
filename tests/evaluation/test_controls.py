"""The control selections: what each keeps, and that they work wherever the product does."""

from dataclasses import replace

import pytest
import torch

from fulmen.evaluation.controls import (
    AttentionRecallSelector,
    KeyHeadOracleSelector,
    OracleSelector,
    RandomSelector,
    WindowSelector,
    attention_of_rows,
)
from fulmen.modeling.gqa.cache import DsaCache
from fulmen.modeling.mla.attention import fulmen_attention
from fulmen.modeling.selectors import DenseSelector, IndexerSelector, SelectionInputs, Selector, use_selector
from fulmen.ops.attention.reference import attention_reference
from fulmen.ops.common.intervals import interval_mask, selection_mask
from fulmen.ops.topk.reference import select_topk_reference
from tests.evaluation.parity.tiny_parity import (
    LAYERS,
    LENGTH,
    TOPK,
    random_ids,
    tiny_dense,
    tiny_dsa,
    tiny_v32,
)

CONTROLS = [OracleSelector(), WindowSelector(), RandomSelector(3)]


def some_inputs(queries=30, keys=30, padding=(0, 5), groups=2, layer=0):
    """Two texts, the second padded on the left; the last `queries` of them."""
    draw = torch.Generator().manual_seed(0)
    stop_BT = torch.arange(keys - queries + 1, keys + 1).repeat(2, 1)
    start_BT = torch.minimum(torch.tensor(padding)[:, None], stop_BT)
    q_BTHD = torch.randn(2, keys, 4, 16, generator=draw)[:, -queries:]
    k_BSGD = torch.randn(2, keys, groups, 16, generator=draw)
    index = (torch.zeros(2, queries, 1, 2), torch.zeros(2, keys, 1, 2), torch.zeros(2, queries, 1), None)
    return SelectionInputs(*index, q_BTHD, k_BSGD, k_BSGD, start_BT, stop_BT, 0.7, layer)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("queries", [1, 7, 30])
def test_oracle_keeps_the_most_attended_keys(groups, queries, monkeypatch):
    monkeypatch.setattr("fulmen.evaluation.controls.BLOCK_PROBS", 4 * 30 * 3)
    inputs = some_inputs(queries, groups=groups)
    visible_BTS = interval_mask(inputs.start_BT, inputs.stop_BT, 30)
    attention = attention_reference(inputs.q_BTHD, inputs.k_BSGD, inputs.v_BSGV, visible_BTS, inputs.scale)
    probs_BTS = attention.probs_BTHS.mean(2)
    torch.testing.assert_close(attention_of_rows(inputs, 1, slice(None)), probs_BTS[1].nan_to_num())
    expected = select_topk_reference(probs_BTS, inputs.start_BT, inputs.stop_BT, 6)
    assert torch.equal(OracleSelector().select(inputs, 6), expected)


def test_window_keeps_exactly_sinks_and_recent_keys():
    chosen_BTK = WindowSelector(sinks=2).select(some_inputs(), 6)
    assert chosen_BTK[0, 29].tolist() == [0, 1, 26, 27, 28, 29]
    assert chosen_BTK[1, 29].tolist() == [5, 6, 26, 27, 28, 29]
    assert chosen_BTK[0, 3].tolist() == [0, 1, 2, 3, -1, -1]
    assert chosen_BTK[0, 6].tolist() == [0, 1, 3, 4, 5, 6]
    assert chosen_BTK[1, 2].tolist() == [-1] * 6


def test_sinks_take_at_most_half_of_the_budget():
    assert WindowSelector(sinks=4).select(some_inputs(), 4)[0, 29].tolist() == [0, 1, 28, 29]
    assert WindowSelector(sinks=4).select(some_inputs(), 1)[0, 29].tolist() == [29]


def test_random_is_deterministic_and_differs_by_seed_layer_and_query():
    chosen = RandomSelector(1).select(some_inputs(), 6)
    assert torch.equal(chosen, RandomSelector(1).select(some_inputs(), 6))
    assert not torch.equal(chosen, RandomSelector(2).select(some_inputs(), 6))
    assert not torch.equal(chosen, RandomSelector(1).select(some_inputs(layer=1), 6))
    assert len({tuple(row) for row in chosen[0, 20:].tolist()}) == 10


def test_random_keys_are_equally_likely():
    counts = torch.zeros(30)
    for seed in range(400):
        counts += torch.bincount(RandomSelector(seed).select(some_inputs(1), 6)[0, 0], minlength=30)
    # 400 x 6 / 30 = 80 each; five standard deviations.
    assert (counts - 80).abs().max() < 5 * (400 * 0.2 * 0.8) ** 0.5


def test_random_ignores_padding():
    bare, padded = some_inputs(padding=(0, 0)), some_inputs(padding=(0, 5))
    shorter = RandomSelector().select(bare, 6)[0, 24]
    assert torch.equal(RandomSelector().select(padded, 6)[1, 29], shorter + 5)


@pytest.mark.parametrize("control", CONTROLS, ids=lambda control: type(control).__name__)
@pytest.mark.parametrize("topk", [1, 5, 64])
def test_every_row_is_visible_distinct_and_full(control, topk):
    inputs = some_inputs(queries=20)
    chosen_BTK = control.select(inputs, topk)
    assert chosen_BTK.dtype == torch.int32
    assert chosen_BTK.shape == (2, 20, min(topk, 30))
    for row, start, stop in zip(
        chosen_BTK.flatten(0, 1).tolist(), inputs.start_BT.flatten(), inputs.stop_BT.flatten(), strict=True
    ):
        kept = [key for key in row if key >= 0]
        assert len(set(kept)) == len(kept) == min(topk, int(stop - start))
        assert all(start <= key < stop for key in kept)


@pytest.mark.parametrize("control", CONTROLS, ids=lambda control: type(control).__name__)
def test_chunks_with_a_cache_give_the_same_logits(control):
    model, ids_BT = tiny_dsa(tiny_dense()), random_ids(40)[None]
    with use_selector(model, control), torch.no_grad():
        whole = model(ids_BT).logits
        cache = DsaCache(model.config)
        parts = [model(part, past_key_values=cache).logits for part in ids_BT.split([25, 14, 1], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("inner", [IndexerSelector(), *CONTROLS], ids=lambda inner: type(inner).__name__)
@pytest.mark.parametrize("make", [lambda: tiny_dsa(tiny_dense()), tiny_v32], ids=["gqa", "mla"])
def test_oracle_captures_the_most_mass(make, inner):
    model, recalls = make(), AttentionRecallSelector(inner, stride=2)
    mla = fulmen_attention(model) if model.config.model_type == "deepseek_v32" else use_selector(model, inner)
    with mla, torch.no_grad():
        expected = _logits(model, inner)
        assert torch.equal(_logits(model, recalls), expected)
    assert [mass.layer for mass in recalls.result()] == list(range(LAYERS))
    for _, captured, oracle in recalls.result():
        assert 0 < captured <= oracle + 1e-6
        assert oracle < 1
        if isinstance(inner, OracleSelector):
            assert captured == pytest.approx(oracle, abs=1e-6)


def test_mass_counts_only_queries_that_must_choose():
    inputs, recalls = some_inputs(padding=(0, 0)), AttentionRecallSelector(WindowSelector(), stride=1)
    recalls.select(inputs, 30)
    assert recalls.result() == []
    recalls.select(inputs, 29)
    ((layer, captured, oracle),) = recalls.result()
    dropped = (
        attention_of_rows(inputs, 0, slice(29, 30))[0, 4],
        attention_of_rows(inputs, 1, slice(29, 30))[0, 4],
    )
    assert layer == 0
    assert captured == pytest.approx(1 - sum(dropped).item() / 2, abs=1e-6)
    assert oracle >= captured


def test_mass_leaves_the_dense_control_dense():
    assert not AttentionRecallSelector(DenseSelector()).is_needed(LENGTH, TOPK)


def test_mass_of_everything_is_one():
    class Everything(Selector):
        def select(self, inputs, topk):
            return None

    recalls = AttentionRecallSelector(Everything())
    assert recalls.select(some_inputs(), 6) is None
    assert recalls.result()[0].captured == pytest.approx(1, abs=1e-6)


def _logits(model, selector):
    with use_selector(model, selector):
        return model(random_ids(LENGTH)[None], use_cache=False).logits


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("queries", [1, 7, 30])
def test_the_oracle_of_each_key_head_attends_to_its_own_keys(groups, queries):
    inputs = replace(some_inputs(queries, groups=groups), v_BSGV=some_inputs(groups=groups).k_BSGD.flip(1))
    visible_BTS = interval_mask(inputs.start_BT, inputs.stop_BT, 30)
    dense = attention_reference(inputs.q_BTHD, inputs.k_BSGD, inputs.v_BSGV, visible_BTS, inputs.scale)
    probs_BTGMS = dense.probs_BTHS.unflatten(2, (groups, -1))
    expected = []
    for g in range(groups):
        probs_BTS = probs_BTGMS[:, :, g].mean(2)
        kept_BTK = select_topk_reference(probs_BTS, inputs.start_BT, inputs.stop_BT, 6)
        kept_BTS = selection_mask(kept_BTK, 30)
        # Up to 9 keys all are kept.
        kept_BTS |= visible_BTS & (inputs.stop_BT - inputs.start_BT <= 9)[..., None]
        heads = inputs.q_BTHD.unflatten(2, (groups, -1))[:, :, g]
        k_BSGD, v_BSGV = inputs.k_BSGD[:, :, g : g + 1], inputs.v_BSGV[:, :, g : g + 1]
        expected.append(attention_reference(heads, k_BSGD, v_BSGV, kept_BTS, inputs.scale).out_BTHV)
    out_BTHV = KeyHeadOracleSelector().attend(inputs, 6, 9)
    torch.testing.assert_close(out_BTHV, torch.cat(expected, 2), atol=1e-5, rtol=1e-5)


def test_with_one_key_head_both_oracles_are_one_and_with_more_they_differ():
    ids = random_ids(LENGTH)[None]
    model = tiny_dsa(tiny_dense())
    with torch.no_grad(), use_selector(model, OracleSelector()):
        one = model(ids).logits
    with torch.no_grad(), use_selector(model, KeyHeadOracleSelector()):
        assert not torch.allclose(model(ids).logits, one, atol=1e-3)
        torch.testing.assert_close(model(ids[:, :TOPK]).logits, tiny_dense()(ids[:, :TOPK]).logits)
