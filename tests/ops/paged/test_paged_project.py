"""New tokens' projections, RoPE and storing in one pass: as one after the other, by every backend."""

from functools import cache

import pytest
import torch

from fulmen import ConfigError
from fulmen.ops.common.index_keys import unpack_index_keys
from fulmen.ops.dispatch import pin_backend
from fulmen.ops.paged.layer import NewTokens, PagedLayer
from fulmen.ops.paged.project import Projections, project_and_store
from tests.ops.ops_cases import assert_near, normal
from tests.ops.paged.test_paged_decode import DTYPES, SHAPES

ROWS = 700


def project_case(shape, count, dtype, extra=(9, 5, 67), seed=0):
    """A layer with poisoned caches, `count` tokens that go to scattered rows of it, and what they bring."""
    n_heads, kv_heads, width, index_heads, index_kv_heads, index_width, n_pairs = shape
    # Rows of the caches lie apart, as in a block of several layers.
    kv = torch.full((ROWS, kv_heads + 1, 2 * width), torch.nan, dtype=dtype)[:, :kv_heads]
    packed = torch.full((ROWS, index_kv_heads * (index_width + 2)), 99, dtype=torch.int8)
    pairs = torch.arange(index_kv_heads * index_width // 2).view(index_kv_heads, -1) * 7 % (n_pairs + 1)
    layer = PagedLayer(kv, packed, pairs, n_heads, index_heads, 9, 9, width**-0.5)
    rows, index_rows = (
        torch.randperm(ROWS, generator=torch.Generator().manual_seed(s))[:count] for s in (1, 2)
    )
    angles = normal(count, n_pairs, seed=seed + 2)
    tokens = NewTokens(rows, index_rows, angles.cos().to(dtype), angles.sin().to(dtype))
    # Rows may lie apart, and what makes index heads may hold more than is read: poison. (Not NaN: oneDNN
    # multiplies what follows a row of bfloat16 numbers by 0.)
    all_qk = normal(count, (n_heads + kv_heads) * width + 40, seed=seed + 4, dtype=dtype)
    all_qk[:, (n_heads + kv_heads) * width + extra[0] + extra[1] :] = 1e30
    inputs = {
        "qkv_TX": normal(count, (n_heads + 2 * kv_heads) * width + 3, seed=seed + 3, dtype=dtype)[:, 3:],
        "all_qk_TX": all_qk,
        "x_TC": normal(count, extra[2], seed=seed + 5, dtype=dtype),
    }
    widths = (n_heads * width + extra[0], kv_heads * width + extra[1], extra[2])
    matrices = (normal(y, x, seed=seed + y) * x**-0.5 for y, x in zip(layer.index_rows, widths, strict=True))
    bias = normal(2 * index_heads, seed=seed + 6, dtype=dtype)
    return layer, Projections(*(matrix.to(dtype) for matrix in matrices), bias), tokens, inputs


def length_that(selects):
    return 10**6 if selects else 1


@cache  # for all backends
def expected_of(shape, count, dtype, selects):
    """The caches that are written, and what is returned."""
    layer, *case, inputs = project_case(shape, count, dtype)
    with pin_backend("reference"):
        q_THD, index = project_and_store(layer, *case, **inputs, longest=length_that(selects))
    return layer, (q_THD, *(index or ()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("count", "selects"),
    [*((count, True) for count in (1, 2, 16, 31, 33, 128, 300)), *((count, False) for count in (1, 33, 300))],
)
def test_one_pass_is_projecting_rotating_and_storing(backend, dtype, shape, count, selects):
    ours, *case, inputs = project_case(shape, count, dtype)
    q_THD, index = project_and_store(ours, *case, **inputs, longest=length_that(selects))
    assert (index is not None) == selects
    reference, expected_made = expected_of(shape, count, dtype, selects)
    for one, expected in zip((q_THD, *(index or ())), expected_made, strict=True):
        assert_near(one, expected, dtype)
    tokens, written = case[1], (ours, reference)
    assert_near(ours.kv_RGC[tokens.rows_T], reference.kv_RGC[tokens.rows_T], dtype)
    heads = (x.packed_RX[tokens.index_rows_T].unflatten(1, (shape[4], -1)) for x in written)
    keys, expected = (unpack_index_keys(x) for x in heads)
    # A key whose rounding differs may be one of 255 codes further.
    assert (keys - expected).abs().max() <= expected.abs().amax() / 100
    others = torch.ones(ROWS, dtype=torch.bool)
    others[tokens.index_rows_T] = False
    assert (ours.packed_RX[others] == 99).all()


def test_a_token_does_not_feel_its_neighbours(backend):
    """One that is not finite makes NaN of itself alone."""
    layer, *case, inputs = project_case(SHAPES[0], 40, torch.bfloat16, extra=(0, 0, 64))
    clean, clean_index = project_and_store(layer, *case, **inputs, longest=length_that(selects=True))
    inputs["qkv_TX"][7] = inputs["all_qk_TX"][7] = inputs["x_TC"][7] = torch.nan
    poisoned, poisoned_index = project_and_store(layer, *case, **inputs, longest=length_that(selects=True))
    others = [t for t in range(40) if t != 7]
    for one, other in zip((clean, *clean_index[:3]), (poisoned, *poisoned_index[:3]), strict=True):
        torch.testing.assert_close(other[others], one[others], rtol=0, atol=0)
        assert other[7].isnan().all()


def test_inputs_that_do_not_fit_are_refused():
    layer, projections, tokens, inputs = project_case(SHAPES[0], 5, torch.float32)
    for name, wrong, message in (
        ("qkv_TX", inputs["qkv_TX"][:, 1:], r"qkv_TX has shape \(5, 959\).* must have \(5, 960\)"),
        ("x_TC", inputs["x_TC"][:4], r"x_TC has shape \(4, 67\)"),
        ("all_qk_TX", inputs["all_qk_TX"].bfloat16(), "all_qk_TX has .* torch.bfloat16"),
    ):
        with pytest.raises(ConfigError, match=message):
            project_and_store(
                layer, projections, tokens, **(inputs | {name: wrong}), longest=length_that(selects=True)
            )
    fewer = Projections(projections.q_YX[1:], projections.k_YX, projections.w_YC, projections.bias_Y)
    with pytest.raises(ConfigError, match=r"projections have .* rows; the layer asks for"):
        project_and_store(layer, fewer, tokens, **inputs, longest=length_that(selects=True))
