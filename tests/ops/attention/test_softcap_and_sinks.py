"""Soft caps on the logits of attention, and sinks in its softmax: every backend against the formulas."""

from functools import cache

import pytest
import torch
from torch.nn.functional import pad

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

# A cap that bends all logits, and one that bends hardly any.
CHANGES = {"cap": (2.0, False), "high cap": (50.0, False), "sinks": (None, True), "both": (2.0, True)}
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
    found = operation(*tensors[:3], *keys_of(name, CASES[case][0]), 0.3, softcap, *tensors[3:])
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


@pytest.mark.parametrize("name", ["causal", "sparse"])
def test_a_sink_is_a_key_of_no_value(name):
    """One before the others that all queries see; a number of its own in queries and keys makes its logit."""
    q, k, v, sinks = (x.detach() for x in qkv_and_sinks("many", torch.float32, True))
    keys, operation = keys_of(name, CASES["many"][0]), OPERATIONS[name][0]
    found = operation(q, k, v, *keys, 1.0, None, sinks)
    q = torch.cat((q, sinks[:, None].expand(*q.shape[:3], 1)), -1)
    k, v = pad(k, (0, 1, 0, 0, 1, 0)), pad(v, (0, 0, 0, 0, 1, 0))
    k[:, 0, :, -1] = 1
    keys = (keys[0], keys[1] + 1) if name == "causal" else (pad(keys[0] + (keys[0] >= 0), (0, 1)),)
    for a, b in zip(found, operation(q, k, v, *keys, 1.0), strict=True):
        assert_near(a, b, torch.float32)


def test_parts_of_the_keys_are_merged_by_their_lse_where_one_of_them_has_the_sinks():
    q, k, v, sinks = (x.detach() for x in qkv_and_sinks("many", torch.float32, True))
    start, stop = causal(*CASES["many"][0][:3])
    whole = dense_attention(q, k, v, start, stop, 0.3, 2.0, sinks)
    early = dense_attention(q, k, v, start, stop.clamp(max=50), 0.3, 2.0, sinks)
    late = dense_attention(q, k, v, start + 50, stop, 0.3, 2.0)
    share = (late[1] - early[1]).sigmoid()[..., None]
    assert_near(early[0].lerp(late[0], share), whole[0], torch.float32)
    assert_near(torch.logaddexp(early[1], late[1]), whole[1], torch.float32)


@pytest.mark.parametrize("name", ["dense", "sparse"])
def test_a_query_without_keys_gives_zero_and_its_sink(name):
    q, k, v, sinks = qkv_and_sinks("decode", torch.float32, True)
    operation = OPERATIONS[name][0]
    nothing = {"dense": (torch.full((2, 1), 7),) * 2, "sparse": (torch.full((2, 1, 3), -1),)}[name]
    out, lse = operation(q, k, v, *nothing, 0.3, 2.0, sinks)
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(lse, sinks.expand(2, 1, 6))
    for gradient in torch.autograd.grad(out.sum(), (q, k, v, sinks)):
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["dense", "sparse"])
def test_no_cap_hides_an_infinite_key(name, dtype):
    """Of one sign for all queries: a logit that tanh would bring back to the cap."""
    q, k, v = (x.detach().clone() for x in qkv_and_sinks("many", dtype, False))
    q[..., 0], k[:, 30, :, 0] = q[..., 0].abs() + 1, torch.inf
    operation, sizes = OPERATIONS[name][0], CASES["many"][0]
    out, _ = operation(q, k, v, *keys_of(name, sizes), 0.3, 2.0)
    clean, _ = operation(q, k.nan_to_num(0, 0, 0), v, *keys_of(name, sizes), 0.3, 2.0)
    _, reference = OPERATIONS[name]
    sees_T = reference(q, k, v, *keys_of(name, sizes), 0.3).visible_BTS[0, :, 30]
    assert 0 < sees_T.sum() < len(sees_T)
    assert out[0, sees_T].isnan().all()
    assert_near(out[0, ~sees_T], clean[0, ~sees_T], dtype)
