"""In which precision every operation computes, whatever the dtype of its inputs."""

import pytest
import torch

from fulmen.ops.dispatch import pin_backend
from fulmen.ops.losses.selection import selection_loss
from fulmen.ops.topk import index_topk, select_topk
from tests.ops.ops_cases import op_inputs

pytestmark = pytest.mark.usefixtures("backend")

OPERATIONS = list(op_inputs())
COMPUTED_IN = {
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
    torch.float32: torch.float32,
    torch.float64: torch.float64,
}
SIZES = {"B": 2, "T": 19, "S": 60, "E": 16, "D": 16, "K": 12}


def cast(inputs, dtype):
    return {
        name: x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for name, x in inputs.items()
    }


def results(operation, inputs):
    found = operation(**inputs)
    return found if isinstance(found, tuple) else (found,)


@pytest.mark.parametrize("dtype", COMPUTED_IN, ids=str)
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.__name__)
def test_inputs_of_every_dtype_are_computed_in_float32_or_float64(operation, dtype):
    given = cast(op_inputs(**SIZES)[operation], dtype)
    found = results(operation, given)
    with pin_backend("reference"):
        exact = results(operation, cast(given, torch.float64))
    for one, other in zip(found, exact, strict=True):
        if not one.is_floating_point():
            assert torch.equal(one, other)
        elif one.dtype in (torch.bfloat16, torch.float16):  # rounded once; a product of probabilities before
            assert one.dtype == dtype
            torch.testing.assert_close(one.double(), other, rtol=2e-2, atol=2e-2)
        else:
            assert one.dtype == COMPUTED_IN[dtype]
            tolerance = 1e-12 if dtype == torch.float64 else 3e-5
            torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance)


def test_float64_scores_are_compared_in_float64():
    """Neighbours by 2^-52 are the same number in float32; ties, NaN and infinities rank as ever."""
    S = 400
    order = torch.randperm(S, generator=torch.Generator().manual_seed(0))
    scores = (1 + order.double() * 2.0**-52)[None, None]
    interval = torch.tensor([[3]]), torch.tensor([[S - 2]])
    for topk in (1, 7, 390):
        best = scores[0, 0, 3 : S - 2].topk(topk).indices.sort().values + 3
        assert select_topk(scores, *interval, topk)[0, 0].tolist() == best.tolist()
    inf, nan, least = torch.inf, torch.nan, 5e-324
    odd = torch.tensor([-inf, nan, 0.0, least, -0.0, -least, inf, -inf, nan], dtype=torch.float64)
    seen = torch.tensor([[0]]), torch.tensor([[9]])
    # From the best; of equals, the later first.
    ranked = [6, 3, 4, 2, 5, 7, 0, 8, 1]
    for topk in range(1, 9):
        assert select_topk(odd[None, None], *seen, topk)[0, 0].tolist() == sorted(ranked[:topk])


def test_float64_inputs_of_the_indexer_are_compared_in_float64():
    """Keys that differ by 2^-40 of themselves."""
    S = 120
    order = torch.randperm(S, generator=torch.Generator().manual_seed(1))
    k = (1 + order.double() * 2.0**-40)[None, :, None, None]
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    chosen = index_topk(one[..., None], k, one, None, torch.tensor([[0]]), torch.tensor([[S]]), 9)
    assert chosen[0, 0].tolist() == order.topk(9).indices.sort().values.tolist()


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.__name__)
def test_autocast_casts_what_torch_would_and_computes_in_float32(operation):
    inputs = op_inputs(**SIZES)[operation]
    heads = [name for name in inputs if name.endswith(("_BTHD", "_BSGD", "_BSGV", "_BTJE", "_BSIE"))]
    if operation is selection_loss:  # takes everything as it is
        heads = []
    rounded = {**inputs, **cast({name: inputs[name] for name in heads}, torch.bfloat16)}
    expected = results(operation, rounded)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = results(operation, inputs)
        double = results(operation, cast(inputs, torch.float64))
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    for one, other in zip(double, results(operation, cast(inputs, torch.float64)), strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
