"""The indexer's losses on a GPU, with gradients: the Triton kernels beside the torch backend."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.ops.gpu_inputs import (
    GQA,
    TOPK,
    attention_inputs,
    causal,
    differs,
    index_inputs,
    normal,
    random_selection,
)
from fulmen.ops.dispatch import pin_backend
from fulmen.ops.losses.indexer import indexer_loss, indexer_loss_selected
from fulmen.ops.losses.selection import selection_loss

LOSSES = ("KL over all keys", "KL over the selected", "selection loss")


def check_losses() -> str | None:
    """Of the rows that training draws, against the torch backend; the same bits each time."""
    for name, call in loss_calls(192, 4096).items():
        found, again = call(), call()
        with pin_backend("torch"):
            wanted = call()
        if not all(map(torch.equal, found, again)):
            return f"{name} differs from run to run"
        for a, b in zip(found, wanted, strict=True):
            if failure := differs(a, b, 2e-2):
                return f"{name}: {failure}"
    return None


def both_backends(name: str, queries: int, keys: int) -> dict[str, Callable[[], Any]]:
    """A loss by the kernels, and by plain torch."""
    call = loss_calls(queries, keys)[name]
    return {"dsa": call, "torch backend": partial(by_torch, call)}


def by_torch(call: Callable[[], Any]) -> Any:
    with pin_backend("torch"):
        return call()


def loss_calls(queries: int, keys: int) -> dict[str, Callable[[], list[Tensor]]]:
    """Each loss of the indexer with its gradients, one layer of a GQA model."""
    index = [x.requires_grad_() for x in index_inputs(GQA, queries, keys)]
    q, k, v = attention_inputs(GQA, queries, keys)
    interval, scale = causal(queries, keys), GQA.heads[2] ** -0.5
    topk, kept = random_selection(queries, keys), min(TOPK, keys // 4)
    out_weight = normal(64, GQA.heads[0] * GQA.heads[3], seed=8)

    def with_gradients(loss_of: Callable[[], Tensor]) -> list[Tensor]:
        loss = loss_of()
        return [loss.detach(), *torch.autograd.grad(loss.sum(), index)]

    losses: dict[str, Callable[[], Tensor]] = {
        LOSSES[0]: lambda: indexer_loss(*index, None, q, k, *interval, scale).kl_BT,
        LOSSES[1]: lambda: indexer_loss_selected(*index, None, q, k, topk, scale).kl_BT,
        LOSSES[2]: lambda: selection_loss(*index, None, q, k, v, out_weight, *interval, kept, scale, 0.5),
    }
    return {name: partial(with_gradients, loss_of) for name, loss_of in losses.items()}
