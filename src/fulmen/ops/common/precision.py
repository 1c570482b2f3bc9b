"""In which dtype the operations compute, with and without autocast."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def math_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of all arithmetic: float64 for float64 inputs (gradient checks), else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def nan_for_infinity(x: Tensor) -> Tensor:
    """Infinity too as NaN: an indexer's query that is not finite so scores NaN, whatever the keys."""
    return x.masked_fill(x.isinf(), torch.nan)


def cap_logits(logits: Tensor, softcap: float | None) -> Tensor:
    """c tanh(l / c) with c = `softcap` (Gemma 2, arXiv 2408.00118); None: as they are.

    An infinite logit becomes NaN: capped, it would hide that a key or a query is not finite.
    """
    return logits if softcap is None else torch.tanh(nan_for_infinity(logits) / softcap) * softcap


def cast_as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast, the tensors in its dtype, as torch's own attention would take them; else unchanged.

    float64 stays, and so do packed index keys.
    """
    kind = tensors[0].device.type
    if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    stays = (torch.float64, torch.int8)
    return tuple(tensor if tensor.dtype in stays else tensor.to(dtype) for tensor in tensors)


def outside_autocast(device: torch.device) -> AbstractContextManager:
    """Autocast would turn our float32 arithmetic into bfloat16; inside this context it does not."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
