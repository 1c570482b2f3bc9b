"""Index keys in 8 bits: what comes back, how far off it is, and what a key that is no number does."""

import pytest
import torch

from fulmen.ops.common.index_keys import pack_index_keys, round_index_keys, unpack_index_keys
from tests.ops.ops_cases import normal

SHAPE = (2, 5, 3, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-12, 1.0, 1e6])
def test_off_by_half_a_level_at_most(dtype, size):
    keys = (normal(*SHAPE) * size).to(dtype)
    packed = pack_index_keys(keys)
    assert packed.dtype == torch.int8
    assert packed.shape == (*SHAPE[:-1], 8 + 2)
    off = (unpack_index_keys(packed) - keys.float()).abs().amax(-1)
    # Half a level of 1/127; the scale is rounded up to bfloat16, by up to 1/128.
    assert (off <= keys.float().abs().amax(-1) * (0.5 / 127) * (1 + 1 / 128) * 1.0001).all()


def test_each_token_and_head_has_its_own_scale():
    keys = normal(*SHAPE)
    changed = keys.clone()
    changed[0, 2, 1] *= 1e4
    same = (unpack_index_keys(pack_index_keys(keys)) == unpack_index_keys(pack_index_keys(changed))).all(-1)
    assert same.sum() == same.numel() - 1
    assert not same[0, 2, 1]


def test_the_largest_number_uses_the_whole_range_and_zero_stays_zero():
    keys = torch.tensor([[[[0.0, 0.0]], [[-4.0, 1.0]]]])
    packed = pack_index_keys(keys)
    assert packed[0, 0, 0].tolist() == [0, 0, 0, 0]
    assert packed[0, 1, 0, 0] in (-126, -127)
    assert not unpack_index_keys(packed)[0, 0].any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_key_that_is_not_finite_comes_back_as_nan_and_no_other_does(bad):
    keys = normal(*SHAPE)
    expected = unpack_index_keys(pack_index_keys(keys))
    keys[1, 3, 0, 2] = bad
    found = unpack_index_keys(pack_index_keys(keys))
    assert found[1, 3, 0].isnan().all()
    found[1, 3, 0] = expected[1, 3, 0]
    assert torch.equal(found, expected)


def test_training_sees_the_stored_numbers_and_the_gradient_of_the_exact_ones():
    keys = normal(*SHAPE).requires_grad_()
    rounded = round_index_keys(keys)
    torch.testing.assert_close(rounded, unpack_index_keys(pack_index_keys(keys)), rtol=0, atol=1e-6)
    weight = normal(*SHAPE, seed=1)
    (gradient,) = torch.autograd.grad((rounded * weight).sum(), keys)
    assert torch.equal(gradient, weight)


@pytest.mark.parametrize("width", [1, 7, 8, 33])
def test_one_key_alone_is_read_as_among_others(width):
    """Its scale may then lie at an odd address."""
    packed = pack_index_keys(normal(2, 3, 2, width))
    together = unpack_index_keys(packed)
    for b, s, i in [(0, 0, 0), (1, 2, 1)]:
        one = (slice(b, b + 1), slice(s, s + 1), slice(i, i + 1))
        assert torch.equal(unpack_index_keys(packed[one]), together[one])


def test_non_contiguous_and_double():
    keys = normal(8, 3, 5, 2, dtype=torch.float64).permute(3, 2, 1, 0)
    packed = pack_index_keys(keys)
    assert torch.equal(packed, pack_index_keys(keys.contiguous()))
    assert unpack_index_keys(packed, torch.float64).dtype == round_index_keys(keys).dtype == torch.float64
