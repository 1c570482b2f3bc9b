"""Inputs of the GPU benchmarks, and how results are compared."""

from typing import NamedTuple

import torch
from torch import Tensor

TOPK = 2048
DTYPE = torch.bfloat16


class Shape(NamedTuple):
    """Heads H over G key heads, widths D and V; index heads J over I, width E."""

    heads: tuple[int, int, int, int]
    index_heads: tuple[int, int, int]


GQA = Shape((32, 8, 128, 128), (8, 8, 48))
V32 = Shape((128, 1, 576, 512), (64, 1, 128))


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = DTYPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda").to(dtype)


def causal(queries: int, keys: int) -> tuple[Tensor, Tensor]:
    stop = torch.arange(keys - queries + 1, keys + 1, device="cuda")[None]
    return torch.zeros_like(stop), stop


def index_inputs(shape: Shape, queries: int, keys: int) -> list[Tensor]:
    J, index_keys, E = shape.index_heads
    return [normal(1, queries, J, E), normal(1, keys, index_keys, E, seed=1), normal(1, queries, J, seed=2)]


def attention_inputs(shape: Shape, queries: int, keys: int, grad: bool = False) -> list[Tensor]:
    H, G, D, V = shape.heads
    shapes = [(1, queries, H, D), (1, keys, G, D), (1, keys, G, V)]
    return [normal(*s, seed=i).requires_grad_(grad) for i, s in enumerate(shapes)]


def random_selection(queries: int, keys: int) -> Tensor:
    rows = [torch.rand(keys, device="cuda").topk(TOPK).indices for _ in range(queries)]
    return torch.stack(rows).sort(-1).values.int()[None]


def differs(found: Tensor, wanted: Tensor, tolerance: float) -> str | None:
    try:
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
    except AssertionError as error:
        return " ".join(str(error).split())[:200]
    return None
