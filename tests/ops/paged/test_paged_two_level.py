"""An index in two levels over paged caches: in one call the same as its parts, by every backend."""

import dataclasses

import pytest
import torch

from fulmen import ConfigError
from fulmen.ops.common.index_keys import pack_index_keys
from fulmen.ops.dispatch import pin_backend
from fulmen.ops.paged import PagedCoarse, paged_attention, paged_index_topk
from fulmen.ops.paged.layer import CoarseCache, store_tokens
from fulmen.ops.paged.project import Projections, project_and_store
from fulmen.ops.two_level import two_level_topk
from tests.ops.ops_cases import assert_near, normal
from tests.ops.paged.test_paged import BATCH, scatter, scattered_rows
from tests.ops.paged.test_paged_decode import SHAPES, decode_case, decoded
from tests.ops.paged.test_paged_sparse import SHAPES as SPARSE_SHAPES
from tests.ops.paged.test_paged_sparse import attended, sparse_case

DTYPES = [torch.float32, torch.bfloat16]
WIDTHS = [24, 6, 70]
HEADS = 5  # M


def coarse_decode_case(shape, keys, topk, dense_up_to, dtype, width, n_candidates):
    """`decode_case` with a coarse level, whose rows lie elsewhere."""
    layer, (projections, tokens, key_rows), inputs = decode_case(shape, keys, topk, dense_up_to, dtype)
    rows = scattered_rows(keys, 9)
    numbers = normal(len(layer.kv_RGC), 1, width, seed=11)
    pairs = torch.arange(width // 2) * 5 % (shape[-1] + 1)
    coarse = CoarseCache(pack_index_keys(numbers).flatten(1), pairs, HEADS, n_candidates, n_candidates)
    layer = dataclasses.replace(layer, coarse=coarse)
    new = rows.gather(1, key_rows.stop_BT - 1)[:, 0].long()
    coarse_matrices = (
        normal(rows, matrix.shape[1], seed=12, dtype=dtype) * matrix.shape[1] ** -0.5
        for rows, matrix in ((HEADS * width, projections.q_YX), (width, projections.k_YX))
    )
    w_YC = torch.cat((projections.w_YC, projections.w_YC[:HEADS]))
    bias_Y = torch.cat((projections.bias_Y, torch.full((HEADS,), 2.0)))
    kept = (projections.q_YX, projections.k_YX, w_YC, bias_Y)
    step = (
        Projections(*kept, *coarse_matrices),
        dataclasses.replace(tokens, coarse_rows_T=new),
        dataclasses.replace(key_rows, coarse_rows_BS=rows),
    )
    return layer, step, inputs


def coarse_copied(layer):
    coarse = dataclasses.replace(layer.coarse, packed_RX=layer.coarse.packed_RX.clone())
    return dataclasses.replace(
        layer, kv_RGC=layer.kv_RGC.clone(), packed_RX=layer.packed_RX.clone(), coarse=coarse
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(
    ("keys", "topk", "dense_up_to", "n_candidates"), [(1, 4, 4, 8), (300, 16, 16, 48), (300, 9, 250, 60)]
)
def test_a_decoding_step_is_its_parts(backend, dtype, shape, width, keys, topk, dense_up_to, n_candidates):
    layer, step, inputs = coarse_decode_case(shape, keys, topk, dense_up_to, dtype, width, n_candidates)
    by_parts = coarse_copied(layer)
    out = decoded(layer, step, inputs)
    with pin_backend("torch"):
        expected = decoded(by_parts, step, inputs)
    assert_near(out, expected, dtype)
    assert torch.equal(layer.packed_RX, by_parts.packed_RX)
    assert torch.equal(layer.coarse.packed_RX, by_parts.coarse.packed_RX)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SPARSE_SHAPES, ids=str)
@pytest.mark.parametrize(("queries", "keys"), [(1, 300), (7, 150), (150, 400)])
def test_queries_of_prompts_select_among_their_candidates(backend, dtype, shape, queries, keys):
    layer, key_rows, inputs = sparse_case(shape, queries, keys, 9, 20, dtype)
    coarse_k = normal(BATCH, keys, 1, 24, seed=21)
    rows = scattered_rows(keys, 9)
    packed = scatter(pack_index_keys(coarse_k).flatten(2), rows, 99)
    layer = dataclasses.replace(
        layer, coarse=CoarseCache(packed, torch.zeros(12, dtype=torch.int64), HEADS, 40, 200)
    )
    key_rows = dataclasses.replace(key_rows, coarse_rows_BS=rows)
    coarse_q = normal(BATCH, queries, HEADS, 24, seed=22, dtype=dtype)
    coarse_b = normal(BATCH, queries, HEADS, seed=23, dtype=dtype)
    out = attended(layer, key_rows, {**inputs, "coarse_q_BTMN": coarse_q, "coarse_b_BTM": coarse_b})
    index = (
        inputs["index_q_BTJE"],
        layer.packed_RX,
        key_rows.index_rows_BS,
        inputs["w_BTJ"],
        inputs["b_BTJ"],
    )
    coarse = PagedCoarse(coarse_q, coarse_b, packed, rows, 40, 200)
    with pin_backend("torch"):
        chosen = paged_index_topk(*index, key_rows.stop_BT, 9, 20, coarse)
    expected = paged_attention(
        inputs["q_BTHD"], layer.kv_RGC, key_rows.rows_BS, key_rows.stop_BT, chosen, layer.scale
    )
    different = (out - expected).abs().amax((-1, -2)) > 0.05
    # Two keys may swap ranks where the backends' scores differ in the last bit.
    assert different.float().mean() < 0.02


def test_paged_selection_is_that_of_gathered_keys(backend):
    layer, (_, _, key_rows), _ = coarse_decode_case(SHAPES[0], 300, 8, 8, torch.float32, 24, 40)
    q, w, b = normal(BATCH, 1, 9, 48, seed=1), normal(BATCH, 1, 9, seed=2), normal(BATCH, 1, 9, seed=3)
    coarse_q, coarse_b = normal(BATCH, 1, HEADS, 24, seed=4), normal(BATCH, 1, HEADS, seed=5)
    coarse = PagedCoarse(coarse_q, coarse_b, layer.coarse.packed_RX, key_rows.coarse_rows_BS, 40, 40)
    chosen = paged_index_topk(
        q, layer.packed_RX, key_rows.index_rows_BS, w, b, key_rows.stop_BT, 8, 8, coarse
    )
    keys = layer.packed_RX[key_rows.index_rows_BS.long()].unflatten(-1, (3, 50))
    coarse_keys = layer.coarse.packed_RX[key_rows.coarse_rows_BS.long()]
    start = torch.zeros_like(key_rows.stop_BT)
    expected = two_level_topk(coarse_q, coarse_keys, coarse_b, q, keys, w, b, start, key_rows.stop_BT, 8, 40)
    assert torch.equal(chosen, expected)


def test_paged_keys_that_are_no_numbers_in_the_coarse_level_are_left_to_the_indexer(backend):
    layer, (_, _, key_rows), _ = coarse_decode_case(SHAPES[0], 300, 8, 8, torch.float32, 24, 40)
    q, w, b = normal(BATCH, 1, 9, 48, seed=1), normal(BATCH, 1, 9, seed=2), normal(BATCH, 1, 9, seed=3)
    index = (q, layer.packed_RX, key_rows.index_rows_BS, w, b, key_rows.stop_BT, 8, 8)
    best_BK = paged_index_topk(*index)[:, 0].long()
    packed = layer.coarse.packed_RX.clone()
    of_best = key_rows.coarse_rows_BS.long().gather(1, best_BK)
    packed[of_best] = pack_index_keys(torch.full((1, 24), torch.nan))
    coarse_q, coarse_b = normal(BATCH, 1, HEADS, 24, seed=4), normal(BATCH, 1, HEADS, seed=5)
    coarse = PagedCoarse(coarse_q, coarse_b, packed, key_rows.coarse_rows_BS, 40, 40)
    assert torch.equal(paged_index_topk(*index, coarse)[:, 0].long(), best_BK)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("longest", "made"), [(8, 0), (9, 3), (40, 3), (41, 5)])
def test_prompts_store_what_decoding_stores(backend, dtype, longest, made):
    layer, (projections, tokens, _), inputs = coarse_decode_case(SHAPES[0], 300, 8, 8, dtype, 24, 40)
    by_parts = coarse_copied(layer)
    found = project_and_store(layer, projections, tokens, **inputs, longest=longest)
    with pin_backend("torch"):
        expected = project_and_store(by_parts, projections, tokens, **inputs, longest=longest)
    codes = layer.coarse.packed_RX[..., :-2].int() - by_parts.coarse.packed_RX[..., :-2].int()
    assert codes.abs().max() <= 1  # products are added in other orders
    ours, theirs = ([x for x in index or () if x is not None] for _, index in (found, expected))
    assert len(ours) == len(theirs) == made
    for one, other in zip(ours, theirs, strict=True):
        assert_near(one, other, dtype)


@pytest.mark.parametrize("queries", [1, 40])
def test_where_no_query_has_candidates_none_asks_the_coarse_level(backend, queries):
    layer, key_rows, inputs = sparse_case(SPARSE_SHAPES[0], queries, 300, 9, 20, torch.bfloat16)
    packed = scatter(
        pack_index_keys(normal(BATCH, 300, 1, 24, seed=21)).flatten(2), scattered_rows(300, 9), 99
    )
    coarse = CoarseCache(packed, torch.zeros(12, dtype=torch.int64), HEADS, 40, 300)
    two_levels = dataclasses.replace(layer, coarse=coarse)
    rows = dataclasses.replace(key_rows, coarse_rows_BS=scattered_rows(300, 9))
    assert torch.equal(attended(two_levels, rows, inputs), attended(layer, key_rows, inputs))
    few = dataclasses.replace(two_levels, coarse=dataclasses.replace(coarse, all_up_to=299))
    with pytest.raises(ConfigError, match="coarse_q_BTMN is missing; the layer has one coarse level"):
        attended(few, rows, inputs)


def test_a_coarse_level_needs_its_rows_and_queries():
    layer, (projections, tokens, key_rows), inputs = coarse_decode_case(
        SHAPES[0], 50, 8, 8, torch.float32, 24, 40
    )
    bare = dataclasses.replace(tokens, coarse_rows_T=None)
    with pytest.raises(ConfigError, match="coarse_rows_T is missing; the layer has one coarse level"):
        decoded(layer, (projections, bare, key_rows), inputs)
    bare = dataclasses.replace(key_rows, coarse_rows_BS=None)
    with pytest.raises(ConfigError, match="coarse_rows_BS is missing; the layer has one coarse level"):
        decoded(layer, (projections, tokens, bare), inputs)
    one_level = dataclasses.replace(layer, coarse=None)
    with pytest.raises(ConfigError, match="the layer asks for"):
        decoded(one_level, (projections, tokens, key_rows), inputs)
    with pytest.raises(ConfigError, match="packed_RX of coarse keys has dtype"):
        CoarseCache(layer.coarse.packed_RX, torch.zeros(5, dtype=torch.int64), HEADS, 40, 40)
    heads = (normal(BATCH, *layer.shapes[name]) for name in ("q", "k", "v", "index_q", "index_k"))
    with pytest.raises(ConfigError, match=r"coarse_k has shape \(2, 7\)"):
        store_tokens(layer, tokens, *heads, None, torch.zeros(BATCH, 7))
