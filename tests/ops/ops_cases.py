"""Inputs, intervals and tolerances that the tests of the operations share."""

import torch
from torch import Tensor

# Largest allowed difference, relative and absolute, by the dtype of the inputs. For bfloat16 the results
# themselves are rounded to 8 bits.
TOLERANCE = {
    torch.float64: {"rtol": 1e-11, "atol": 1e-12},
    torch.float32: {"rtol": 2e-5, "atol": 5e-6},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},
}
DTYPES = list(TOLERANCE)


def assert_near(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(actual, expected, equal_nan=True, **TOLERANCE[dtype])


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """The same numbers in every dtype, up to rounding."""
    numbers = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return numbers.to(dtype)


def causal(batch: int, queries: int, keys: int) -> tuple[Tensor, Tensor]:
    """The last `queries` of `keys` positions, each seeing its past and itself."""
    stop = torch.arange(keys - queries + 1, keys + 1).expand(batch, queries)
    return torch.zeros_like(stop), stop


def ragged(batch: int, queries: int, keys: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Arbitrary intervals: some empty, some beyond the keys."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(-2, keys, (batch, queries), generator=generator)
    length = torch.randint(-3, keys, (batch, queries), generator=generator)
    return start, start + length


def random_selection(batch: int, queries: int, keys: int, topk: int, seed: int = 0) -> Tensor:
    """Distinct keys in random order; a quarter of the entries, and all of one query's, are -1."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(batch, queries, keys, generator=generator).argsort(-1)[..., :topk]
    selected = order.masked_fill(torch.rand(order.shape, generator=generator) < 0.25, -1)
    selected[0, queries // 2] = -1
    return selected.int()


def gradients(outputs: tuple[Tensor, ...], inputs: tuple[Tensor, ...], seed: int = 9) -> tuple[Tensor, ...]:
    """Of a random weighting of the finite numbers among the outputs."""
    total = sum(
        (normal(*out.shape, seed=seed + i).to(out) * out.masked_fill(~out.isfinite(), 0)).sum()
        for i, out in enumerate(outputs)
    )
    return torch.autograd.grad(total, inputs)
