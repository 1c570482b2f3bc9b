"""Which keys a running model selects, read layer by layer."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad


@contextmanager
def told_selections(model: Any) -> Iterator[dict[int, list[Tensor]]]:
    """Within the block one request's prompt is read; the dict fills with what it selects.

    For each converted layer a list of `topk_TK`, int32: positions, ascending, then -1, of the queries that
    see more keys than the model's k, in their order.
    """
    found: dict[int, list[Tensor]] = {}
    attentions = {number: layer.self_attn for number, layer in enumerate(model.model.layers)}
    # Those of GQA and of MLA.
    ours = {number: one for number, one in attentions.items() if hasattr(one, "told")}
    try:
        for number, attention in ours.items():
            found[number] = []
            attention.told = partial(_note, found[number], attention.topk)
        yield found
    finally:
        for attention in ours.values():
            attention.told = None


def stacked(parts: list[Tensor]) -> Tensor:
    """Selections below each other, filled up with -1 to one width."""
    width = max((part.shape[1] for part in parts), default=0)
    empty = torch.empty(0, width, dtype=torch.int32)
    return torch.cat([empty, *(pad(part, (0, width - part.shape[1]), value=-1) for part in parts)])


def _note(found: list[Tensor], topk: int, topk_BTK: Tensor, stop_BT: Tensor) -> None:
    found.append(topk_BTK[stop_BT > topk].cpu())
