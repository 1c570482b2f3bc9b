"""Inputs at the edge of what can be: no texts, queries or keys; far ends; scores that are no numbers."""

from contextlib import contextmanager

import pytest
import torch

from fulmen.ops.attention.dense import dense_attention
from fulmen.ops.attention.sparse import sparse_attention
from fulmen.ops.dispatch import BACKENDS, operations, pin_backend, reason_against_backend
from fulmen.ops.scores import index_scores
from fulmen.ops.topk import index_topk, select_topk
from tests.ops.cpp_levels import EACH_LEVEL, cpp_level
from tests.ops.ops_cases import causal, normal, op_inputs, random_selection

LEAST, MOST = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max
EMPTY = [{"B": 0}, {"T": 0}, {"S": 0}, {"B": 0, "T": 0}, {"B": 0, "S": 0}, {"T": 0, "S": 0}, {"K": 0}]
PAIRS = [
    (operation, backend)
    for operation in op_inputs()
    for backend in (*(name for name in BACKENDS if name != "cpp"), *EACH_LEVEL)
    if operation.__name__ in operations(backend.partition("-")[0])
]


@contextmanager
def pin_or_skip(operation, backend):
    if backend in EACH_LEVEL:
        with cpp_level(backend), pin_backend("cpp"):
            yield
        return
    if reason := reason_against_backend(backend, operation.__name__, "cpu", torch.float32):
        pytest.skip(f"{backend}: {reason}")
    with pin_backend(backend):
        yield


def each_pair(*operations):
    pairs = [pair for pair in PAIRS if not operations or pair[0] in operations]
    ids = [f"{operation.__name__}-{backend}" for operation, backend in pairs]
    return pytest.mark.parametrize(("operation", "backend"), pairs, ids=ids)


@pytest.mark.parametrize("sizes", EMPTY, ids=lambda sizes: "".join(f"{name}0" for name in sizes))
@each_pair()
def test_an_empty_input_has_an_empty_or_zero_result_and_gradient(operation, backend, sizes):
    inputs = op_inputs(**{"K": 2, **sizes})[operation]
    if "topk" in inputs:
        inputs["topk"] = 2
    leaves = [
        x.requires_grad_() for x in inputs.values() if isinstance(x, torch.Tensor) and x.is_floating_point()
    ]
    with pin_or_skip(operation, backend):
        outputs = operation(**inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        of_queries = next(x for name, x in inputs.items() if name.endswith("_BT") or name == "topk_BTK")
        for out in outputs:
            assert out.shape[:2] == of_queries.shape[:2]
        if outputs[0].requires_grad:
            for gradient in torch.autograd.grad(outputs[0].sum(), leaves, allow_unused=True):
                assert gradient is None or gradient.isfinite().all()
    if "S" in sizes or operation is sparse_attention:
        assert not outputs[0].any() or operation is index_scores


@each_pair(index_topk, select_topk, index_scores, dense_attention)
def test_ends_far_outside_are_clipped(operation, backend):
    inputs = op_inputs(B=1, T=6, S=9)[operation]
    start, stop = [LEAST, 5, MOST, 2, -1, MOST], [MOST, LEAST, MOST, MOST, 3, 4]
    found = {**inputs, "start_BT": torch.tensor([start]), "stop_BT": torch.tensor([stop])}
    clipped = {**inputs, "start_BT": torch.tensor([[0, 9, 9, 2, 0, 9]])}
    clipped["stop_BT"] = torch.tensor([[9, 0, 9, 9, 3, 4]])
    with pin_or_skip(operation, backend):
        found, expected = operation(**found), operation(**clipped)
    for one, other in zip(*(x if isinstance(x, tuple) else (x,) for x in (found, expected)), strict=True):
        assert torch.equal(one, other)


@each_pair(sparse_attention)
def test_an_index_below_int32_is_nothing(operation, backend):
    q, k, v = (normal(2, n, heads, 8, seed=n) for n, heads in ((4, 4), (30, 2), (31, 2)))
    v = v[:, :30]
    topk = random_selection(2, 4, 30, 9).long()
    mismatched = topk.masked_fill(topk < 0, -(2**32))  # 0, in 32 bits
    mismatched[..., 0] = torch.where(topk[..., 0] < 0, -(2**31) - 1, topk[..., 0])  # the largest int32
    with pin_or_skip(operation, backend):
        assert torch.equal(
            sparse_attention(q, k, v, mismatched, 0.3)[0], sparse_attention(q, k, v, topk, 0.3)[0]
        )


@each_pair(index_topk)
def test_scores_that_overflow_or_are_no_numbers_rank_alike_everywhere(operation, backend):
    """Keys of 1e30 to both sides: a head's logit is +inf or shut, and heads of both signs make NaN."""
    B, T, S = 2, 9, 130
    q, k = normal(B, T, 4, 8).sign(), normal(B, S, 2, 8, seed=1).round()
    w, b = normal(B, T, 4, seed=2).sign(), normal(B, T, 4, seed=3).round()
    q[..., 1:], k[..., 1:] = 0, 0
    k[:, ::7] *= 1e38
    q *= 100
    k[:, 3::17] = torch.nan
    inputs = (q, k, w, b, *causal(B, T, S))
    with pin_backend("reference"):
        scores, expected = index_scores(*inputs), index_topk(*inputs, 20)
    seen = scores[scores > -torch.inf]
    assert scores.isnan().any()
    assert scores.isposinf().any()
    assert len(seen[seen.isfinite()].unique()) > 5
    with pin_or_skip(operation, backend):
        assert torch.equal(index_topk(*inputs, 20), expected)


@each_pair(index_topk, select_topk)
def test_a_budget_beyond_the_keys_keeps_all_of_them(operation, backend):
    inputs = op_inputs(B=2, T=3, S=5)[operation]
    with pin_or_skip(operation, backend):
        for topk in (5, 6, 2**40):
            chosen = operation(**{**inputs, "topk": topk})
            assert torch.equal(chosen, torch.arange(5, dtype=torch.int32).expand(2, 3, -1))
