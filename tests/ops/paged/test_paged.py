"""Selection and attention from a paged cache: the same as on the gathered rows, by every backend."""

import pytest
import torch

from fulmen import ConfigError
from fulmen.ops.attention.dense import dense_attention
from fulmen.ops.attention.sparse import sparse_attention
from fulmen.ops.common.index_keys import pack_index_keys, unpack_index_keys
from fulmen.ops.dispatch import pin_backend
from fulmen.ops.paged import paged_attention, paged_index_topk, store_index_keys
from fulmen.ops.topk import index_topk
from tests.ops.ops_cases import assert_near, causal, normal, random_selection

BATCH, SPARE = 2, 37
SHAPES = [(9, 3, 48), (4, 2, 8), (3, 1, 2), (6, 3, 20), (2, 2, 30), (2, 1, 62), (2, 1, 64)]


def scattered_rows(keys, seed=5):
    """Each key of each batch row in a row of its own, in no order, as int32 within a wider table."""
    order = torch.randperm(BATCH * keys + SPARE, generator=torch.Generator().manual_seed(seed))
    table = torch.zeros(BATCH, keys + 3, dtype=torch.int32)
    table[:, :keys] = order[: BATCH * keys].view(BATCH, keys)
    return table[:, :keys]


def scatter(x_BSX, rows_BS, filler):
    rows_RX = x_BSX.new_full((BATCH * x_BSX.shape[1] + SPARE, *x_BSX.shape[2:]), filler)
    rows_RX[rows_BS.long()] = x_BSX
    return rows_RX


def index_case(heads, kv_heads, width, queries, keys):
    """Index inputs with many ties, packed keys by token, and causal ends; the second row ends earlier."""
    packed = pack_index_keys(normal(BATCH, keys, kv_heads, width, seed=1))
    packed[:, 4] = packed[:, 3]
    q = normal(BATCH, queries, heads, width, seed=2)
    w, b = normal(BATCH, queries, heads, seed=3), normal(BATCH, queries, heads, seed=4) - 1
    _, stop = causal(BATCH, queries, keys)
    stop = stop - torch.tensor([[0], [keys // 3]])
    return q, packed, w, b, stop.clamp(min=0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("queries", "keys"), [(1, 130), (1, 5), (70, 75), (9, 300)])
@pytest.mark.parametrize(("topk", "dense_up_to"), [(16, 16), (9, 40), (40, 9)])
def test_selection_is_that_of_the_gathered_keys(backend, shape, queries, keys, topk, dense_up_to):
    q, packed, w, b, stop = index_case(*shape, queries, keys)
    rows = scattered_rows(keys)
    chosen = paged_index_topk(q, scatter(packed.flatten(2), rows, 77), rows, w, b, stop, topk, dense_up_to)
    start = torch.zeros_like(stop)
    best = index_topk(q, unpack_index_keys(packed), w, b, start, stop, topk)
    assert chosen.shape == (BATCH, queries, min(keys, max(topk, dense_up_to)))
    for row in range(BATCH):
        for t in range(queries):
            expected = (
                range(stop[row, t])
                if stop[row, t] <= dense_up_to
                else best[row, t][best[row, t] >= 0].tolist()
            )
            kept = chosen[row, t].tolist()
            assert kept == [*expected, *[-1] * (len(kept) - len(expected))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [32, 24, 64])
@pytest.mark.parametrize("queries", [1, 40])
def test_attention_is_that_of_the_gathered_rows(backend, dtype, width, queries):
    keys = 90
    rows = scattered_rows(keys)
    q = normal(BATCH, queries, 6, width, seed=1, dtype=dtype)
    kv = normal(BATCH, keys, 2, 2 * width, seed=2, dtype=dtype)
    k, v = kv.split(width, -1)
    paged = scatter(kv, rows, torch.nan)
    start, stop = causal(BATCH, queries, keys)
    with pin_backend("reference"):
        dense, _ = dense_attention(q, k, v, start, stop, 0.2)
        topk = random_selection(BATCH, queries, keys, 33)
        sparse, _ = sparse_attention(q, k, v, topk, 0.2)
    assert_near(paged_attention(q, paged, rows, stop, None, 0.2), dense, dtype)
    assert_near(paged_attention(q, paged, rows, stop, topk, 0.2), sparse, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stored_index_keys_are_the_packed_ones(backend, dtype):
    keys = normal(500, 3, 20, seed=6, dtype=dtype) * torch.logspace(-45, 38, 500)[:, None, None].to(dtype)
    keys[0], keys[1, 1, 3], keys[2, 0, 4], keys[3, 2] = 0, torch.nan, -torch.inf, 127
    rows = torch.randperm(600)[:500]
    packed = torch.full((600, 66), 9, dtype=torch.int8)
    store_index_keys(keys, packed, rows)
    expected = pack_index_keys(keys)
    assert torch.equal(
        unpack_index_keys(packed[rows].view(500, 3, 22)).nan_to_num(-7),
        unpack_index_keys(expected).nan_to_num(-7),
    )
    assert (packed[torch.arange(600)[~torch.isin(torch.arange(600), rows)]] == 9).all()


def test_a_key_that_is_not_finite_comes_back_as_such(backend):
    q, packed, w, b, stop = index_case(4, 2, 8, 1, 60)
    keys = unpack_index_keys(packed)
    keys[:, 7] = torch.nan
    rows = scattered_rows(60)
    rows_RX = scatter(pack_index_keys(keys).flatten(2), rows, 0)
    assert 7 not in paged_index_topk(q, rows_RX, rows, w, b, stop, 16, 0).tolist()[0][0]


def test_inputs_that_do_not_fit_are_refused():
    q, packed, w, b, stop = index_case(4, 2, 8, 1, 60)
    rows = scattered_rows(60)
    rows_RX = scatter(packed.flatten(2), rows, 0)
    with pytest.raises(ConfigError, match="stop_BT has T=2"):
        paged_index_topk(q, rows_RX, rows, w, b, stop.repeat(1, 2), 16, 0)
    with pytest.raises(ConfigError, match="packed_RX has dtype"):
        paged_index_topk(q, rows_RX.float(), rows, w, b, stop, 16, 0)
    with pytest.raises(ConfigError, match="rows_BS has B=1"):
        paged_attention(q, normal(9, 2, 16), rows[:1], stop, None, 1.0)
    with pytest.raises(ConfigError, match="kv_RGC has C=8"):
        paged_attention(q, normal(9, 2, 8), rows, stop, None, 1.0)
