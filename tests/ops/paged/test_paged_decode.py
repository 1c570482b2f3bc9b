"""A decoding step in one call: the same as its parts one by one, by every backend, in every layout."""

import dataclasses

import pytest
import torch

from fulmen import ConfigError
from fulmen.ops.dispatch import pin_backend
from fulmen.ops.paged.decode import paged_decode
from fulmen.ops.paged.layer import NewTokens, PagedLayer, store_tokens
from fulmen.ops.paged.project import Projections
from fulmen.ops.paged.sparse import KeyRows
from tests.ops.ops_cases import assert_near, normal
from tests.ops.paged.test_paged import BATCH, scattered_rows

# H, G, D, J, I, E, rotary pairs
SHAPES = [
    (9, 3, 64, 9, 3, 48, 32),
    (4, 4, 20, 6, 2, 8, 10),
    (6, 2, 32, 4, 1, 62, 8),
    (8, 1, 128, 3, 3, 2, 64),
]
DTYPES = [torch.float32, torch.bfloat16]


def decode_case(shape, keys, topk, dense_up_to, dtype, seed=0):
    """A layer with filled caches, sequences of which the second is shorter, and the new tokens' heads."""
    n_heads, kv_heads, width, index_heads, index_kv_heads, index_width, n_pairs = shape
    rows, index_rows = scattered_rows(keys, seed), scattered_rows(keys, seed + 1)
    n_rows = BATCH * keys + 37
    # Rows of the caches lie apart, as in a block of several layers.
    kv = normal(n_rows, kv_heads + 1, 2 * width, seed=seed, dtype=dtype)[:, :kv_heads]
    packed = torch.randint(-127, 128, (n_rows, index_kv_heads, index_width + 2), dtype=torch.int8)
    packed[..., -2:] = (torch.rand(n_rows, index_kv_heads, 1) / 64).bfloat16().view(torch.int8)
    pairs = torch.arange(index_kv_heads * index_width // 2).view(index_kv_heads, -1) * 7 % (n_pairs + 1)
    layer = PagedLayer(kv, packed.flatten(1), pairs, n_heads, index_heads, topk, dense_up_to, width**-0.5)
    angles = normal(BATCH, n_pairs, seed=seed + 2)
    stop = torch.tensor([keys, keys - keys // 3])
    new = (x.gather(1, stop[:, None] - 1)[:, 0].long() for x in (rows, index_rows))
    tokens = NewTokens(*new, angles.cos().to(dtype), angles.sin().to(dtype))
    inputs = {
        # Rows may lie apart, and what makes index heads may hold more than is read.
        "qkv_TX": normal(BATCH, (n_heads + 2 * kv_heads) * width + 3, seed=seed + 3, dtype=dtype)[:, 3:],
        "all_qk_TX": normal(BATCH, (n_heads + kv_heads) * width + 40, seed=seed + 4, dtype=dtype),
        "x_TC": normal(BATCH, 67, seed=seed + 5, dtype=dtype),
    }
    widths = (n_heads * width + 9, kv_heads * width + 5, 67)
    matrices = (normal(y, x, seed=seed + y) * x**-0.5 for y, x in zip(layer.index_rows, widths, strict=True))
    bias = normal(2 * index_heads, seed=seed + 6, dtype=dtype)
    projections = Projections(*(matrix.to(dtype) for matrix in matrices), bias)
    return layer, (projections, tokens, KeyRows(rows, index_rows, stop[:, None])), inputs


def decoded(layer, step, inputs):
    """The layer's output; it is poisoned first."""
    out = torch.full((BATCH, layer.out_width), torch.nan, dtype=layer.kv_RGC.dtype)[: len(inputs["x_TC"])]
    paged_decode(layer, *step, **inputs, out_TX=out)
    return out


def rows_of(part, some):
    """Some rows of all tensors of a step's part."""
    tensors = (getattr(part, field.name) for field in dataclasses.fields(part))
    return type(part)(*(None if x is None else x[some] for x in tensors))


def copied(layer):
    return dataclasses.replace(layer, kv_RGC=layer.kv_RGC.clone(), packed_RX=layer.packed_RX.clone())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("keys", "topk", "dense_up_to"), [(1, 4, 4), (40, 60, 20), (300, 16, 16), (300, 16, 250)]
)
def test_one_call_is_its_parts(backend, dtype, shape, keys, topk, dense_up_to):
    layer, step, inputs = decode_case(shape, keys, topk, dense_up_to, dtype)
    by_parts = copied(layer)
    out = decoded(layer, step, inputs)
    with pin_backend("torch"):
        expected = decoded(by_parts, step, inputs)
    assert_near(out, expected, dtype)
    # Stored to the bit, so that a token written here and one written by a prompt are the same.
    assert torch.equal(layer.kv_RGC, by_parts.kv_RGC)
    assert torch.equal(layer.packed_RX, by_parts.packed_RX)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("keys", "dense_up_to"), [(40, 40), (300, 16)])
def test_logits_are_capped_and_sinks_take_part(backend, dtype, keys, dense_up_to):
    layer, step, inputs = decode_case(SHAPES[1], keys, 16, dense_up_to, dtype)
    changed = dataclasses.replace(layer, softcap=1.5, sinks_H=normal(4, seed=8, dtype=dtype))
    out = decoded(copied(changed), step, inputs)
    with pin_backend("torch"):
        expected = decoded(copied(changed), step, inputs)
    assert_near(out, expected, dtype)
    assert (out - decoded(copied(layer), step, inputs)).abs().max() > 0.1


def test_the_new_token_is_among_those_read(backend):
    layer, step, inputs = decode_case(SHAPES[0], 50, 4, 60, torch.float32)
    layer.kv_RGC.zero_()  # all other keys lose
    q, k, v = inputs["qkv_TX"].unflatten(1, (-1, 64)).split((9, 3, 3), 1)
    q.copy_(100 * k.repeat_interleave(3, 1))
    assert_near(decoded(layer, step, inputs), v.repeat_interleave(3, 1).flatten(1), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_is_scored_while_all_keys_are_kept(backend, dtype):
    layer, step, inputs = decode_case(SHAPES[0], 70, 8, 70, dtype)
    expected = decoded(copied(layer), step, inputs)
    # What makes weights and shifts may then be anything.
    poisoned = {**inputs, "x_TC": torch.full_like(inputs["x_TC"], torch.nan)}
    assert torch.equal(decoded(copied(layer), step, poisoned), expected)


def test_a_sequence_alone_has_the_same_bits_as_in_a_batch(backend):
    layer, step, inputs = decode_case(SHAPES[0], 500, 32, 32, torch.bfloat16)
    together = decoded(copied(layer), step, inputs)
    for row in range(BATCH):
        one = slice(row, row + 1)
        alone = [rows_of(part, one) for part in step[1:]]
        out = decoded(copied(layer), (step[0], *alone), {name: x[one] for name, x in inputs.items()})
        assert torch.equal(out, together[one])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("queries", [True, False])
def test_tokens_are_rotated_and_stored_to_the_bit(backend, dtype, shape, queries):
    layer, (_, tokens, _), _ = decode_case(shape, 300, 8, 8, dtype)
    heads = {
        name: normal(BATCH, *layer.shapes[name], seed=i, dtype=dtype) for i, name in enumerate(layer.shapes)
    }
    heads["v"] = heads["v"].mT.contiguous().mT
    inputs = [heads[name] if queries or name != "index_q" else None for name in layer.shapes]
    by_parts = copied(layer)
    rotated = store_tokens(layer, tokens, *inputs)
    with pin_backend("torch"):
        expected = store_tokens(by_parts, tokens, *inputs)
    assert torch.equal(rotated[0], expected[0])
    assert torch.equal(rotated[1], expected[1]) if queries else rotated[1] is expected[1] is None
    assert torch.equal(layer.kv_RGC, by_parts.kv_RGC)
    assert torch.equal(layer.packed_RX, by_parts.packed_RX)


def test_inputs_that_do_not_fit_are_refused():
    layer, step, inputs = decode_case(SHAPES[0], 50, 8, 8, torch.float32)
    projections, tokens, key_rows = step
    fewer = dataclasses.replace(projections, q_YX=projections.q_YX[:-1])
    with pytest.raises(
        ConfigError, match=r"projections have \(431, 144, 18\) rows; the layer asks for \(432, "
    ):
        decoded(layer, (fewer, tokens, key_rows), inputs)
    one = rows_of(key_rows, slice(1))
    with pytest.raises(ConfigError, match=r"2 tokens belong .* stop_BT has shape \(1, 1\)"):
        decoded(layer, (projections, tokens, one), inputs)
    with pytest.raises(ConfigError, match=r"qkv_TX has shape \(2, 959\).* it must have \(2, 960\)"):
        decoded(layer, step, {**inputs, "qkv_TX": inputs["qkv_TX"][:, 1:]})
    with pytest.raises(ConfigError, match=r"all_qk_TX has shape \(2, 700\)"):
        decoded(layer, step, {**inputs, "all_qk_TX": inputs["all_qk_TX"][:, :700]})
    with pytest.raises(ConfigError, match=r"x_TC has .* torch.bfloat16"):
        decoded(layer, step, {**inputs, "x_TC": inputs["x_TC"].bfloat16()})
    with pytest.raises(ConfigError, match="w_YC has dtype"):
        dataclasses.replace(projections, w_YC=projections.w_YC.bfloat16())
    with pytest.raises(ConfigError, match=r"packed_RX has dtype torch.int8 and X=149"):
        dataclasses.replace(layer, packed_RX=layer.packed_RX[:, :-1])
    with pytest.raises(ConfigError, match=r"sinks_H has H=3"):
        dataclasses.replace(layer, sinks_H=torch.zeros(3))
    with pytest.raises(ConfigError, match=r"stop_BT has dtype torch\.int32"):
        dataclasses.replace(key_rows, stop_BT=key_rows.stop_BT.int())
