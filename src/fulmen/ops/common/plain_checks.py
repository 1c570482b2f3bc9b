"""Checks of the doors in `ops/functional.py`: those of `checks.py`, with the names that callers know."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fulmen.errors import ConfigError
from fulmen.ops.common.checks import (
    check_axes,
    check_floating,
    check_integer,
    check_multiple,
    check_same_device,
    check_same_dtype,
    shown_name,
)
from fulmen.ops.common.precision import cast_as_autocast

INTEGER_AXES = {"start": "BT", "stop": "BT", "indices": "BTK"}
OPTIONAL = ("b", "start", "stop", "sinks", "out_gate")


def check_plain_scores(scores: Tensor, **intervals: Tensor | None) -> dict[str, int]:
    """Of `select_topk`; returns the sizes of the axes."""
    sizes = _check_all({"scores BTS": scores}, intervals)
    check_floating(scores=scores)
    return sizes


def check_plain_index(
    q: Tensor, k: Tensor, w: Tensor, b: Tensor | None, **intervals: Tensor | None
) -> dict[str, int]:
    """Of an indexer's inputs; returns the sizes of the axes."""
    sizes = _check_all(_index_axes(q, k, w, b), intervals)
    _check_castable(q=q, k=k)
    check_floating(w=w, b=b)
    check_multiple(sizes, "J", "I")
    return sizes


def check_plain_attention(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, **integers: Tensor | None
) -> dict[str, int]:
    """Of attention's inputs; returns the sizes of the axes."""
    sizes = _check_all({"q BTHD": q, "k BSGD": k, "v BSGV": v, "sinks H": sinks}, integers)
    _check_castable(q=q, k=k, v=v)
    check_floating(sinks=sinks)
    check_multiple(sizes, "H", "G")
    return sizes


def check_plain_losses(
    index: tuple[Tensor, Tensor, Tensor, Tensor | None],
    attn: dict[str, Any],
    integers: dict[str, Tensor | None],
) -> dict[str, int]:
    """Of a loss: the indexer's inputs (q, k, w, b), the attention's by name and axes, as "attn_q BTHD"."""
    q, k, w, b = index
    plain = {shown_name(name): x for name, x in attn.items()}
    sizes = _check_all({**_index_axes(q, k, w, b), **attn}, integers)
    _check_castable(q=q, k=k)
    _check_castable(attn_q=plain["attn_q"], attn_k=plain["attn_k"])
    check_floating(w=w, b=b, **plain)
    check_multiple(sizes, "J", "I")
    check_multiple(sizes, "H", "G")
    return sizes


def with_key_head_axis(k: Tensor) -> Tensor:
    """Index keys [B, S, E] as those of one key head, [B, S, 1, E]; anything else as it is."""
    return k.unsqueeze(2) if isinstance(k, Tensor) and k.dim() == 3 else k


def causal_or_given(
    like: Tensor, sizes: dict[str, int], start: Tensor | None, stop: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The intervals `[B, T]` of the keys that each query sees, on the device of `like`."""
    n_queries, n_keys, shape = sizes["T"], sizes["S"], (sizes["B"], sizes["T"])
    if start is None:
        start = torch.zeros(shape, dtype=torch.int64, device=like.device)
    if stop is None:
        stop = torch.arange(n_keys - n_queries + 1, n_keys + 1, device=like.device).expand(shape)
    return start, stop


def scale_or_default(scale: float | None, q: Tensor) -> float:
    """`scale`, or D**-0.5. Raises ConfigError if it is no finite number."""
    return q.shape[-1] ** -0.5 if scale is None else check_number("scale", scale)


def softcap_or_none(softcap: float | None) -> float | None:
    """`softcap`. Raises ConfigError if it is no finite number above 0."""
    return None if softcap is None else check_above_zero("softcap", softcap)


def check_number(name: str, value: float) -> float:
    """Raise ConfigError unless `value` is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"{name}={value!r} cannot be; use a finite number")
    return float(value)


def check_above_zero(name: str, value: float) -> float:
    """Raise ConfigError unless `value` is a finite number above 0."""
    if check_number(name, value) <= 0:
        raise ConfigError(f"{name}={value!r} cannot be; use a number above 0")
    return float(value)


def _index_axes(q: Tensor, k: Tensor, w: Tensor, b: Tensor | None) -> dict[str, Tensor | None]:
    return {"q BTJE": q, "k BSIE": k, "w BTJ": w, "b BTJ": b}


def _check_all(named: Mapping[str, Tensor | None], integers: Mapping[str, Tensor | None]) -> dict[str, int]:
    """Types, axes, integers and devices; returns the sizes of the axes."""
    integers = {f"{name} {INTEGER_AXES[name]}": x for name, x in integers.items()}
    tensors = {**named, **integers}
    for name, x in tensors.items():
        if not isinstance(x, Tensor) and (x is not None or shown_name(name) not in OPTIONAL):
            kind = type(x).__name__
            raise ConfigError(f"{shown_name(name)} is of type {kind}; it must be a torch.Tensor")
    sizes = check_axes(**tensors)
    check_integer(**{name: x for name, x in integers.items() if x is not None})
    check_same_device(**tensors)
    return sizes


def _check_castable(**tensors: Tensor) -> None:
    """Raise ConfigError unless all are of one floating dtype, under autocast after its cast."""
    check_floating(**tensors)
    check_same_dtype(**dict(zip(tensors, cast_as_autocast(*tensors.values()), strict=True)))
