"""Soft caps on the logits of attention, and sinks in its softmax: every backend against the formulas."""

from functools import cache

import pytest
import torch

from fulmen.errors import ConfigError
from fulmen.ops.attention.dense import dense_attention
from fulmen.ops.attention.dense.reference import dense_attention_reference
from fulmen.ops.attention.sparse import sparse_attention
from fulmen.ops.attention.sparse.reference import sparse_attention_reference
from tests.ops.ops_cases import (
    DTYPES,
    assert_near,
    causal,
    normal,
    ragged,
    random_selection,
    with_gradients,
)

pytestmark = pytest.mark.usefixtures("backend")

# With logits of +-6 and more: a cap that bends all, and one that bends a few.
CHANGES = {"cap": (4.0, False), "high cap": (50.0, False), "sinks": (None, True), "both": (4.0, True)}
# B, T, S, K; H, G, D, V. By tiles of the CPU where it has them; one query; odd sizes, latents.
CASES = {
    "many": ((1, 40, 120, 60), (6, 2, 32, 32)),
    "decode": ((2, 1, 83, 9), (6, 2, 8, 8)),
    "absorbed": ((2, 9, 83, 9), (4, 1, 12, 7)),
}
OPERATIONS = {
    "dense": (dense_attention, dense_attention_reference),
    "causal": (dense_attention, dense_attention_reference),
    "sparse": (sparse_attention, sparse_attention_reference),
}


def keys_of(name, sizes):
    B, T, S, K = sizes
    return {
        "dense": lambda: ragged(B, T, S),
        "causal": lambda: causal(B, T, S),
        "sparse": lambda: (random_selection(B, T, S, K),),
    }[name]()


def qkv_and_sinks(case, dtype, has_sinks):
    (B, T, S, _), (H, G, D, V) = CASES[case]
    shapes = [(B, T, H, D), (B, S, G, D), (B, S, G, V), *[(H,)] * has_sinks]
    return tuple(normal(*s, seed=i, dtype=dtype).requires_grad_() for i, s in enumerate(shapes))


def results(operation, case, name, change, dtype):
    """out, lse and the gradients of both."""
    softcap, has_sinks = CHANGES[change]
    tensors = qkv_and_sinks(case, dtype, has_sinks)
    found = operation(*tensors[:3], *keys_of(name, CASES[case][0]), 0.5, softcap, *tensors[3:])
    return with_gradients(tuple(found)[-2:], tensors)


@cache  # for all backends
def expected_of(case, name, change, dtype):
    return results(OPERATIONS[name][1], case, name, change, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("case", CASES)
def test_match_the_reference_forward_and_backward(case, name, change, dtype):
    found = results(OPERATIONS[name][0], case, name, change, dtype)
    assert [x.dtype for x in found[:2]] == [dtype, torch.float64 if dtype == torch.float64 else torch.float32]
    for x, want in zip(found, expected_of(case, name, change, dtype), strict=True):
        assert_near(x, want, dtype)
