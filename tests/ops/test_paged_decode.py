"""A decoding step in one call: the same as its parts one by one, by every backend, in every layout."""

import dataclasses

import pytest
import torch
from ops_cases import assert_near, normal
from test_paged import BATCH, scattered_rows

from fulmen import ConfigError
from fulmen.ops.dispatch import pin_backend
from fulmen.ops.paged_decode import Projections, Sequences, paged_decode
from fulmen.ops.paged_layer import NewTokens, PagedLayer, store_tokens

# H, G, D, J, I, E, rotary pairs
SHAPES = [
    (9, 3, 64, 9, 3, 48, 32),
    (4, 4, 20, 6, 2, 8, 10),
    (6, 2, 32, 4, 1, 62, 8),
    (8, 1, 128, 3, 3, 2, 64),
]
DTYPES = [torch.float32, torch.bfloat16]


def decode_case(shape, keys, topk, whole, dtype, seed=0):
    """A layer with filled caches, sequences of which the second is shorter, and the new tokens' heads."""
    n_heads, kv_heads, width, index_heads, index_kv_heads, index_width, n_pairs = shape
    rows, index_rows = scattered_rows(keys, seed), scattered_rows(keys, seed + 1)
    n_rows = BATCH * keys + 37
    # Rows of the caches lie apart, as in a block of several layers.
    kv = normal(n_rows, kv_heads + 1, 2 * width, seed=seed, dtype=dtype)[:, :kv_heads]
    packed = torch.randint(-127, 128, (n_rows, index_kv_heads, index_width + 2), dtype=torch.int8)
    packed[..., -2:] = (torch.rand(n_rows, index_kv_heads, 1) / 64).bfloat16().view(torch.int8)
    pairs = torch.arange(index_kv_heads * index_width // 2).view(index_kv_heads, -1) * 7 % (n_pairs + 1)
    layer = PagedLayer(kv, packed.flatten(1), pairs, n_heads, index_heads, topk, whole, width**-0.5)
    angles = normal(BATCH, n_pairs, seed=seed + 2)
    stop = torch.tensor([keys, keys - keys // 3])
    new = (x.gather(1, stop[:, None] - 1)[:, 0].long() for x in (rows, index_rows))
    tokens = NewTokens(*new, angles.cos().to(dtype), angles.sin().to(dtype))
    heads = {
        "q_BHD": normal(BATCH, n_heads + 2 * kv_heads, width, seed=seed + 3, dtype=dtype)[:, :n_heads],
        "k_BGD": normal(BATCH, kv_heads, width, seed=seed + 4, dtype=dtype),
        "v_BGD": normal(BATCH, width, kv_heads, seed=seed + 5, dtype=dtype).mT,
        # More heads than this process has, and widths that are no whole vectors.
        "all_q_BX": normal(BATCH, n_heads * width + 9, seed=seed + 6, dtype=dtype)[:, 2:],
        "all_k_BX": normal(BATCH, kv_heads * width + 5, seed=seed + 7, dtype=dtype),
        "x_BC": normal(BATCH, 67, seed=seed + 8, dtype=dtype),
    }
    projections = projections_for(layer, heads, seed + 9)
    return layer, (projections, tokens, Sequences(rows, index_rows, stop)), heads


def projections_for(layer, heads, seed):
    """Whose results are about as large as what they read."""
    index_heads, index_width = layer.shapes["index_q"]
    rows = (index_heads * index_width, layer.rope_pairs_IP.numel() * 2, 2 * index_heads)
    widths = [heads[name].shape[1] for name in ("all_q_BX", "all_k_BX", "x_BC")]
    matrices = (normal(y, x, seed=seed + y) * x**-0.5 for y, x in zip(rows, widths, strict=True))
    dtype = layer.kv_RGC.dtype
    return Projections(*(matrix.to(dtype) for matrix in matrices), normal(rows[2], seed=seed, dtype=dtype))


def copied(layer):
    return dataclasses.replace(layer, kv_RGC=layer.kv_RGC.clone(), packed_RX=layer.packed_RX.clone())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("keys", "topk", "whole"), [(1, 4, 4), (40, 60, 20), (300, 16, 16), (300, 16, 250)])
def test_one_call_is_its_parts(backend, dtype, shape, keys, topk, whole):
    layer, step, heads = decode_case(shape, keys, topk, whole, dtype)
    by_parts = copied(layer)
    out = paged_decode(layer, *step, **heads)
    with pin_backend("cpu"):
        expected = paged_decode(by_parts, *step, **heads)
    assert_near(out, expected, dtype)
    # Stored to the bit, so that a token written here and one written by a prompt are the same.
    assert torch.equal(layer.kv_RGC, by_parts.kv_RGC)
    assert torch.equal(layer.packed_RX, by_parts.packed_RX)


def test_the_new_token_is_among_those_read(backend):
    layer, step, heads = decode_case(SHAPES[0], 50, 4, 60, torch.float32)
    layer.kv_RGC.zero_()  # all other keys lose
    heads["q_BHD"] = 100 * heads["k_BGD"].repeat_interleave(3, 1)
    out = paged_decode(layer, *step, **heads)
    assert_near(out, heads["v_BGD"].repeat_interleave(3, 1), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_is_scored_while_all_keys_are_kept(backend, dtype):
    layer, step, heads = decode_case(SHAPES[0], 70, 8, 70, dtype)
    expected = paged_decode(copied(layer), *step, **heads)
    # What makes index queries, weights and shifts may then be anything.
    spoilt = {name: torch.full_like(heads[name], torch.nan) for name in ("all_q_BX", "x_BC")}
    assert torch.equal(paged_decode(copied(layer), *step, **{**heads, **spoilt}), expected)


def test_a_sequence_alone_has_the_same_bits_as_in_a_batch(backend):
    layer, step, heads = decode_case(SHAPES[0], 500, 32, 32, torch.bfloat16)
    together = paged_decode(copied(layer), *step, **heads)
    for row in range(BATCH):
        one = slice(row, row + 1)
        alone = (
            type(part)(*(getattr(part, field.name)[one] for field in dataclasses.fields(part)))
            for part in step[1:]
        )
        out = paged_decode(copied(layer), step[0], *alone, **{name: x[one] for name, x in heads.items()})
        assert torch.equal(out, together[one])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("queries", [True, False])
def test_tokens_are_turned_and_stored_to_the_bit(backend, dtype, shape, queries):
    layer, (_, tokens, _), heads = decode_case(shape, 300, 8, 8, dtype)
    index_q, index_k = (
        normal(BATCH, *layer.shapes[name], seed=3, dtype=dtype) for name in ("index_q", "index_k")
    )
    inputs = [heads[name] for name in ("q_BHD", "k_BGD", "v_BGD")] + [index_q if queries else None, index_k]
    by_parts = copied(layer)
    turned = store_tokens(layer, tokens, *inputs)
    with pin_backend("cpu"):
        expected = store_tokens(by_parts, tokens, *inputs)
    assert torch.equal(turned[0], expected[0])
    assert torch.equal(turned[1], expected[1]) if queries else turned[1] is expected[1] is None
    assert torch.equal(layer.kv_RGC, by_parts.kv_RGC)
    assert torch.equal(layer.packed_RX, by_parts.packed_RX)


def test_inputs_that_do_not_fit_are_refused():
    layer, step, heads = decode_case(SHAPES[0], 50, 8, 8, torch.float32)
    projections, tokens, seen = step
    fewer = dataclasses.replace(projections, q_YX=projections.q_YX[:-1])
    with pytest.raises(ConfigError, match="projections have 431, 144, 18 rows; the layer asks for 432, 144"):
        paged_decode(layer, fewer, tokens, seen, **heads)
    one = Sequences(*(getattr(seen, field.name)[:1] for field in dataclasses.fields(seen)))
    with pytest.raises(ConfigError, match="2 tokens belong to as many sequences, not 1"):
        paged_decode(layer, projections, tokens, one, **heads)
    with pytest.raises(ConfigError, match="w_YC has dtype"):
        dataclasses.replace(projections, w_YC=projections.w_YC.bfloat16())
    with pytest.raises(ConfigError, match=r"k has shape \(2, 2, 64\)"):
        paged_decode(layer, *step, **{**heads, "k_BGD": heads["k_BGD"][:, :2]})
    with pytest.raises(ConfigError, match=r"x has .* dtype torch.bfloat16"):
        paged_decode(layer, *step, **{**heads, "x_BC": heads["x_BC"].bfloat16()})
    with pytest.raises(ConfigError, match=r"packed_RX has dtype torch.int8 and X=149"):
        dataclasses.replace(layer, packed_RX=layer.packed_RX[:, :-1])
    with pytest.raises(ConfigError, match=r"stop_B has dtype torch\.int32"):
        dataclasses.replace(seen, stop_B=seen.stop_B.int())
