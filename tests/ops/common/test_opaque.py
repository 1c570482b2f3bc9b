"""Operations as a compiler sees them: one piece each, with the eager results and gradients."""

import pytest
import torch

from fulmen.ops.attention.dense import dense_attention
from fulmen.ops.attention.sparse import sparse_attention
from fulmen.ops.common.index_keys import pack_index_keys
from fulmen.ops.common.opaque import OP_NAMESPACE
from fulmen.ops.dispatch import pin_backend
from fulmen.ops.scores import index_scores
from fulmen.ops.topk import index_topk, select_topk

BACKENDS = ("reference", "torch", "cpp")
B, T, S, H, G, D, V, J, INDEX_KEY_HEADS, E, K = 2, 5, 9, 4, 2, 8, 6, 4, 2, 6, 3


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def intervals():
    stop_BT = torch.arange(S - T + 1, S + 1).expand(B, -1).contiguous()
    start_BT = torch.zeros_like(stop_BT)
    start_BT[1] = 3
    start_BT[1, 0] = stop_BT[1, 0]  # a padding query
    return start_BT, stop_BT


def index_inputs():
    return (
        numbers(B, T, J, E),
        numbers(B, S, INDEX_KEY_HEADS, E, seed=1),
        numbers(B, T, J, seed=2),
        numbers(B, T, J, seed=3),
    )


def attention_inputs():
    return numbers(B, T, H, D), numbers(B, S, G, D, seed=1), numbers(B, S, G, V, seed=2)


def selection():
    return index_topk(*index_inputs(), *intervals(), K)


CASES = {
    "sparse": (sparse_attention, lambda: (*attention_inputs(), selection(), 0.3)),
    "dense": (dense_attention, lambda: (*attention_inputs(), *intervals(), 0.3)),
    "capped": (dense_attention, lambda: (*attention_inputs(), *intervals(), 0.3, 0.5, numbers(H, seed=4))),
    "scores": (index_scores, lambda: (*index_inputs(), *intervals())),
    "no shift": (index_scores, lambda: (*index_inputs()[:3], None, *intervals())),
    "index_topk": (index_topk, lambda: (*index_inputs(), *intervals(), K)),
    "more than all": (index_topk, lambda: (*index_inputs(), *intervals(), 2 * S)),
    "select_topk": (select_topk, lambda: (numbers(B, T, S), *intervals(), K)),
    "pack": (pack_index_keys, lambda: (numbers(B, S, INDEX_KEY_HEADS, E),)),
}
OPERATIONS = {
    "attend_to_selected": (sparse_attention, lambda: (*CASES["sparse"][1](), None)),
    "attend_to_intervals": (dense_attention, lambda: (*CASES["dense"][1](), 0.5)),
    "score_keys": CASES["scores"],
    "select_from_index": CASES["index_topk"],
    "select_from_scores": CASES["select_topk"],
    "pack_numbers": CASES["pack"],
}


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


def as_tuple(found):
    return found if isinstance(found, tuple) else (found,)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_the_results_of_a_compiled_call(case, backend):
    function, make = CASES[case]
    with pin_backend(backend), torch.no_grad():
        found = torch.compile(function, backend="aot_eager", fullgraph=True)(*make())
        for ours, eager in zip(as_tuple(found), as_tuple(function(*make())), strict=True):
            assert ours.dtype == eager.dtype
            torch.testing.assert_close(ours, eager, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ["sparse", "dense", "capped"])
def test_the_gradients_of_a_compiled_call(case, backend):
    """Through both outputs; a query without keys has an lse of -inf, which no loss takes."""
    function, make = CASES[case]
    gradients = []
    for run in (function, torch.compile(function, backend="aot_eager", fullgraph=True)):
        q, k, v, *more = make()
        leaves = [x.requires_grad_() for x in (q, k, v)]
        with pin_backend(backend):
            out_BTHV, lse_BTH = run(*leaves, *more)
            (out_BTHV.square().sum() + lse_BTH[:, 1:].sin().sum()).backward()
        gradients.append([x.grad for x in leaves])
    for ours, eager in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OPERATIONS)
def test_torchs_own_checks_of_an_operation(name):
    _, make = OPERATIONS[name]
    operation = getattr(getattr(torch.ops, OP_NAMESPACE), name).default
    arguments = make()
    if name.startswith("attend"):
        for x in arguments[:3]:
            x.requires_grad_()
    torch.library.opcheck(operation, arguments, test_utils=("test_schema", "test_faketensor"))
