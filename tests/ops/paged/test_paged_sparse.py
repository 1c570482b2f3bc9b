"""Selection and attention over paged caches in one call: as one after the other, by every backend."""

import dataclasses

import pytest
import torch

from fulmen import ConfigError
from fulmen.ops.common.index_keys import pack_index_keys
from fulmen.ops.dispatch import pin_backend
from fulmen.ops.paged import paged_attention, paged_index_topk
from fulmen.ops.paged.layer import PagedLayer
from fulmen.ops.paged.sparse import KeyRows, paged_sparse_attention
from tests.ops.ops_cases import assert_near, causal, normal
from tests.ops.paged.test_paged import BATCH, scatter, scattered_rows

# H, G, D, J, I, E
SHAPES = [(9, 3, 64, 9, 3, 24), (4, 4, 20, 6, 2, 8), (6, 2, 32, 4, 1, 62), (8, 1, 128, 3, 3, 2)]
DTYPES = [torch.float32, torch.bfloat16]
# T, S, K, dense_up_to: queries that select, that see few keys or up to `dense_up_to`, that keep all of those
# they see; one query, fewer than a tile has, several tiles.
SIZES = [
    *((1, 1, 24, 24), (1, 300, 24, 24), (1, 300, 500, 20), (7, 150, 9, 100)),
    *((70, 75, 24, 24), (70, 75, 500, 20), (150, 400, 24, 24), (150, 400, 9, 100)),
]


def sparse_case(shape, queries, keys, topk, dense_up_to, dtype):
    """A layer with filled caches (poisoned where no key lies) and the inputs; the second sequence is shorter.

    Neighbouring queries are alike, so that they select alike, as in a text; some keys are the same.
    """
    n_heads, kv_heads, width, index_heads, index_kv_heads, index_width = shape
    rows, index_rows = scattered_rows(keys), scattered_rows(keys, 6)
    kv = scatter(normal(BATCH, keys, kv_heads, 2 * width, seed=1, dtype=dtype), rows, torch.nan)
    index_keys = normal(BATCH, keys, index_kv_heads, index_width, seed=2)
    index_keys[:, keys // 2] = index_keys[:, 0]
    packed = scatter(pack_index_keys(index_keys).flatten(2), index_rows, 99)
    pairs = torch.zeros(index_kv_heads, index_width // 2, dtype=torch.int64)
    layer = PagedLayer(kv, packed, pairs, n_heads, index_heads, topk, dense_up_to, width**-0.5)
    _, stop = causal(BATCH, queries, keys)
    stop = (stop - torch.tensor([[0], [keys // 3]])).clamp(min=1)
    common = normal(BATCH, 1, index_heads, index_width, seed=3)
    inputs = {
        "q_BTHD": normal(BATCH, queries, n_heads, width + 3, seed=4)[..., 3:].to(dtype),
        "index_q_BTJE": (common + 0.1 * normal(BATCH, queries, index_heads, index_width, seed=5)).to(dtype),
        "w_BTJ": normal(BATCH, queries, 2 * index_heads, seed=6).to(dtype)[..., :index_heads],
        "b_BTJ": normal(BATCH, queries, index_heads, seed=7).to(dtype) - 1,
    }
    return layer, KeyRows(rows, index_rows, stop), inputs


def attended(layer, key_rows, inputs):
    """The output; it is poisoned first."""
    out = torch.full(inputs["q_BTHD"].shape, torch.nan, dtype=layer.kv_RGC.dtype)
    paged_sparse_attention(layer, **inputs, key_rows=key_rows, out_BTHD=out)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("queries", "keys", "topk", "dense_up_to"), SIZES)
def test_one_call_is_selection_and_attention(backend, dtype, shape, queries, keys, topk, dense_up_to):
    layer, key_rows, inputs = sparse_case(shape, queries, keys, topk, dense_up_to, dtype)
    check_one_call(layer, key_rows, inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
@pytest.mark.parametrize(("queries", "keys"), [(1, 300), (7, 150), (150, 400)])
def test_logits_are_capped_and_sinks_take_part(backend, dtype, shape, queries, keys):
    layer, key_rows, inputs = sparse_case(shape, queries, keys, 24, 24, dtype)
    sinks = normal(shape[0], seed=9, dtype=dtype)
    check_one_call(dataclasses.replace(layer, softcap=1.5, sinks_H=sinks), key_rows, inputs)


def test_neighbours_may_select_nothing_alike(backend):
    """Then each query reads its own keys, not the union of theirs."""
    layer, key_rows, inputs = sparse_case(SHAPES[0], 150, 400, 5, 5, torch.bfloat16)
    inputs["index_q_BTJE"] = normal(*inputs["index_q_BTJE"].shape, seed=8).bfloat16()
    check_one_call(layer, key_rows, inputs)


def check_one_call(layer, key_rows, inputs):
    """Against selection, which is tested by itself, and attention one after the other."""
    out = attended(layer, key_rows, inputs)
    index = (
        inputs["index_q_BTJE"],
        layer.packed_RX,
        key_rows.index_rows_BS,
        inputs["w_BTJ"],
        inputs["b_BTJ"],
    )
    topk_BTK = paged_index_topk(*index, key_rows.stop_BT, layer.topk, layer.dense_up_to)
    with pin_backend("reference"):
        q_BTHD, stop_BT = inputs["q_BTHD"], key_rows.stop_BT
        expected = paged_attention(q_BTHD, layer.kv_RGC, key_rows.rows_BS, stop_BT, topk_BTK, *layer.softmax)
    assert_near(out, expected, layer.kv_RGC.dtype)


def test_a_query_does_not_feel_its_neighbours(backend):
    """Selected alone, a query reads the same keys as among others."""
    layer, key_rows, inputs = sparse_case(SHAPES[0], 64, 300, 40, 40, torch.bfloat16)
    together = attended(layer, key_rows, inputs)
    for t in (0, 31, 63):
        alone = {name: x[:, t : t + 1] for name, x in inputs.items()}
        one = dataclasses.replace(key_rows, stop_BT=key_rows.stop_BT[:, t : t + 1])
        assert_near(attended(layer, one, alone), together[:, t : t + 1], torch.bfloat16)


def test_inputs_that_do_not_fit_are_refused():
    layer, key_rows, inputs = sparse_case(SHAPES[0], 5, 30, 8, 8, torch.float32)
    for name, wrong, message in (
        (
            "q_BTHD",
            inputs["q_BTHD"][..., :32],
            r"q_BTHD has shape \(2, 5, 9, 32\).*must have \(2, 5, 9, 64\)",
        ),
        ("index_q_BTJE", inputs["index_q_BTJE"][..., :22], r"index_q_BTJE has shape \(2, 5, 9, 22\)"),
        ("w_BTJ", inputs["w_BTJ"][:, :4], r"w_BTJ has shape \(2, 4, 9\)"),
        ("b_BTJ", inputs["b_BTJ"].bfloat16(), "b_BTJ has .* torch.bfloat16"),
    ):
        with pytest.raises(ConfigError, match=message):
            attended(layer, key_rows, inputs | {name: wrong})
    with pytest.raises(ConfigError, match=r"q_BTHD has .* must have \(2, 1, 9, 64\)"):
        attended(layer, dataclasses.replace(key_rows, stop_BT=key_rows.stop_BT[:, :1]), inputs)
