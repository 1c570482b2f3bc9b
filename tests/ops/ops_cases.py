"""Inputs, intervals and tolerances that the tests of the operations share."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fulmen.ops.attention.dense import dense_attention
from fulmen.ops.attention.sparse import sparse_attention
from fulmen.ops.losses.indexer import indexer_loss, indexer_loss_selected
from fulmen.ops.losses.selection import selection_loss
from fulmen.ops.scores import index_scores
from fulmen.ops.topk import index_topk, select_topk
from tests.ops.cpp_levels import EACH_LEVEL

# Largest allowed difference, relative and absolute, by the dtype of the inputs. For bfloat16 the results
# themselves are rounded to 8 bits.
TOLERANCE = {
    torch.float64: {"rtol": 1e-11, "atol": 1e-12},
    torch.float32: {"rtol": 2e-5, "atol": 5e-6},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},
}
DTYPES = list(TOLERANCE)
# In place of the fixture's own parameters. cpp has no kernels for float64: torch would compute it again.
EACH_BACKEND_AND_DTYPE = pytest.mark.parametrize(
    ("backend", "dtype"),
    [(name, x) for name in ("torch", *EACH_LEVEL) for x in DTYPES if name == "torch" or x != torch.float64],
    indirect=["backend"],
    scope="module",
    ids=str,
)


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
    """Of a random weighting of the finite numbers among the outputs, which may be asked again."""
    total = sum(
        (normal(*out.shape, seed=seed + i).to(out) * out.masked_fill(~out.isfinite(), 0)).sum()
        for i, out in enumerate(outputs)
    )
    return torch.autograd.grad(total, inputs, retain_graph=True)


def with_gradients(outputs: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The outputs, and the gradients of a random weighting of theirs."""
    return (*(out.detach() for out in outputs), *gradients(outputs, inputs))


def op_inputs(B=2, T=3, S=5, H=4, G=2, D=4, J=4, E=6, K=2) -> dict[Callable[..., Any], dict[str, Any]]:
    """Arguments that every operation takes, by operation; I = 2."""
    interval = {"start_BT": torch.zeros(B, T, dtype=torch.int64), "stop_BT": torch.full((B, T), S)}
    topk = {"topk_BTK": torch.arange(min(K, S), dtype=torch.int32).expand(B, T, -1)}
    index = {
        "q_BTJE": normal(B, T, J, E),
        "k_BSIE": normal(B, S, 2, E, seed=1),
        "w_BTJ": normal(B, T, J, seed=2),
        "b_BTJ": normal(B, T, J, seed=3),
    }
    qkv = {
        "q_BTHD": normal(B, T, H, D, seed=4),
        "k_BSGD": normal(B, S, G, D, seed=5),
        "v_BSGV": normal(B, S, G, D, seed=6),
    }
    loss = {**index, "attn_q_BTHD": qkv["q_BTHD"], "attn_k_BSGD": qkv["k_BSGD"], "scale": 1.0}
    values = {"attn_v_BSGV": qkv["v_BSGV"], "out_weight_CN": normal(3, H * D, seed=7)}
    return {
        dense_attention: {**qkv, **interval, "scale": 1.0},
        sparse_attention: {**qkv, **topk, "scale": 1.0},
        index_scores: {**index, **interval},
        index_topk: {**index, **interval, "topk": K},
        select_topk: {"scores_BTS": normal(B, T, S, seed=8), **interval, "topk": K},
        indexer_loss: {**loss, **interval},
        indexer_loss_selected: {**loss, **topk},
        selection_loss: {**loss, **interval, **values, "topk": K, "temperature": 1.0},
    }
