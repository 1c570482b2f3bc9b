"""Feed-forward layers that read long texts a block of tokens at a time."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

# What a block leaves between its matrix products stays in a CPU's cache, and its memory is used again.
TOKENS_PER_BLOCK = 1024
FEED_FORWARD = (("gate_proj", "up_proj", "down_proj"), ("gate_up_proj", "down_proj"), ("c_fc", "c_proj"))


@contextmanager
def feed_forward_in_blocks(model: nn.Module) -> Iterator[None]:
    """On a CPU, let the feed-forward layers of `model` take `TOKENS_PER_BLOCK` tokens after the other.

    Every token's numbers are the same but for rounding; long texts take up to half as long. Without gradient,
    and for plain ones alone: a mixture of experts would read its weights anew in each block.
    """
    layers: list[Any] = [module for module in model.modules() if _is_feed_forward(module)]
    for layer in layers:
        layer.forward = partial(_in_blocks, layer.forward)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _is_feed_forward(module: nn.Module) -> bool:
    """Experts have parameters of such names, not modules."""
    return any(all(name in module._modules for name in names) for names in FEED_FORWARD)


@torch.no_grad()
def _in_blocks(forward: Callable[[Tensor], Tensor], x_BTC: Tensor) -> Tensor:
    if x_BTC.device.type != "cpu":
        return forward(x_BTC)
    out_NC = torch.empty_like(x_BTC).flatten(0, -2)
    for some_NC, x_NC in zip(
        out_NC.split(TOKENS_PER_BLOCK), x_BTC.flatten(0, -2).split(TOKENS_PER_BLOCK), strict=True
    ):
        some_NC.copy_(forward(x_NC))
    return out_NC.view(x_BTC.shape)
