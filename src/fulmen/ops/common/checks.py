"""Input checks that every operation makes before it computes: axes, dtypes, devices."""

import math
from typing import Any

import torch
from torch import Tensor

from fulmen.errors import ConfigError
from fulmen.ops.common.index_keys import SCALE_BYTES, is_packed

# Selected positions are int32, and kernels step past the last key by up to a block.
MOST_KEYS = 2**31 - 2**16
# Heads, and what a dot product sums over. No texts, queries, keys or values is a fine input.
NEVER_EMPTY_AXES = "HGDJIEM"
INTEGER_DTYPES = (torch.int32, torch.int64)


def check_axes(**tensors: Tensor | None) -> dict[str, int]:
    """Sizes of the axes that the names announce (`q_BTHD` has axes B, T, H, D); None is skipped.

    Raises ConfigError if a tensor has another number of axes than its name, two tensors disagree, an axis of
    heads or widths is empty, there are more keys than can be numbered, or a tensor is a sparse one.
    """
    sizes: dict[str, int] = {}
    for name_and_axes, tensor in tensors.items():
        if tensor is None:
            continue
        name, axes = shown_name(name_and_axes), axes_named(name_and_axes)
        if tensor.layout != torch.strided:
            raise ConfigError(f"{name} has layout {tensor.layout}; pass x.to_dense()")
        if tensor.ndim != len(axes):
            raise ConfigError(f"{name} has shape {tuple(tensor.shape)}; it needs the {len(axes)} axes {axes}")
        for axis, size in zip(axes, tensor.shape, strict=True):
            if sizes.setdefault(axis, size) != size:
                raise ConfigError(
                    f"{name} has {axis}={size}, a tensor before it {axis}={sizes[axis]}; make them equal"
                )
            if size < 1 and axis in NEVER_EMPTY_AXES:
                raise ConfigError(f"{name} has {axis}={size}; it needs at least 1")
    if sizes.get("S", 0) > MOST_KEYS:
        raise ConfigError(f"S={sizes['S']} keys cannot be numbered; use at most {MOST_KEYS}")
    return sizes


def shown_name(name: str) -> str:
    """What an error calls a tensor: its name, or of "q BTHD" the first word."""
    return name.partition(" ")[0]


def axes_named(name: str) -> str:
    """The axes that a name announces: "BTHD" of "q_BTHD" and of "q BTHD"."""
    return name.replace(" ", "_").rpartition("_")[2]


def check_multiple(sizes: dict[str, int], many: str, few: str) -> None:
    """Raise ConfigError unless axis `many` (heads) is a multiple of axis `few` (key heads)."""
    if sizes[many] % sizes[few]:
        raise ConfigError(
            f"{many}={sizes[many]} heads cannot share {few}={sizes[few]} key heads; use a multiple"
        )


def check_same_dtype(**tensors: Tensor) -> None:
    """Raise ConfigError unless all are of one floating dtype."""
    first, *_ = tensors.values()
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.dtype != first.dtype:
            raise ConfigError(
                f"{name} has dtype {tensor.dtype}, the first input {first.dtype}; use one floating dtype"
            )


def check_integer(**tensors: Tensor) -> None:
    """Raise ConfigError unless all are int32 or int64: narrower ones cannot even be clipped to 0..S."""
    for name, tensor in tensors.items():
        if tensor.dtype not in INTEGER_DTYPES:
            raise ConfigError(
                f"{shown_name(name)} has dtype {tensor.dtype}; it must be torch.int32 or torch.int64"
            )


def check_same_device(**tensors: Tensor | None) -> None:
    """Raise ConfigError unless all live on one device; None is skipped."""
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    first, *_ = present.values()
    for name, tensor in present.items():
        if tensor.device != first.device:
            raise ConfigError(
                f"{shown_name(name)} is on {tensor.device}, the first input on {first.device}; move it there"
            )


def check_topk_below(topk_BTK: Tensor, n_keys: int) -> None:
    """Raise ConfigError if an index points beyond the keys.

    On a GPU, for which the host would have to wait, the device itself asserts it, as in torch's own indexing.
    """
    if topk_BTK.is_cuda:
        torch._assert_async((topk_BTK < n_keys).all(), f"the selection holds an index beyond S={n_keys} keys")
    elif topk_BTK.numel() and (largest := int(topk_BTK.max())) >= n_keys:
        raise ConfigError(f"the selection holds the index {largest}; there are only S={n_keys} keys")


def check_floating(**tensors: Tensor | None) -> None:
    """Raise ConfigError unless all are of a floating dtype; None is skipped."""
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_floating_point():
            raise ConfigError(f"{name} has dtype {tensor.dtype}; it must be a floating dtype")


def check_index_inputs(
    q_BTJE: Tensor, k_BSIE: Tensor, w_BTJ: Tensor, b_BTJ: Tensor | None, **integers: Tensor
) -> dict[str, int]:
    """The checks of an indexer's inputs and its intervals or indices; returns the sizes of the axes."""
    if is_packed(k_BSIE):
        check_axes(k_BSIE=k_BSIE)
        k_BSIE = k_BSIE[..., :-SCALE_BYTES]
        check_same_dtype(q_BTJE=q_BTJE)
    else:
        check_same_dtype(q_BTJE=q_BTJE, k_BSIE=k_BSIE)
    tensors = {"q_BTJE": q_BTJE, "k_BSIE": k_BSIE, "w_BTJ": w_BTJ, "b_BTJ": b_BTJ, **integers}
    sizes = check_axes(**tensors)
    check_multiple(sizes, "J", "I")
    check_floating(w_BTJ=w_BTJ, b_BTJ=b_BTJ)
    check_integer(**integers)
    check_same_device(**tensors)
    return sizes


def check_attention_inputs(floats: dict[str, Tensor], **integers: Tensor) -> dict[str, int]:
    """The checks of queries, keys, values and their intervals or indices; returns the sizes of the axes."""
    sizes = check_axes(**floats, **integers)
    check_multiple(sizes, "H", "G")
    check_same_dtype(**floats)
    check_integer(**integers)
    check_same_device(**floats, **integers)
    return sizes


def check_softmax_changes(q_BTHD: Tensor, softcap: float | None, sinks_H: Tensor | None) -> None:
    """Raise ConfigError unless the cap is a finite number above 0, and the sinks floats, one a head."""
    if softcap is not None and not 0 < softcap < math.inf:
        raise ConfigError(f"softcap={softcap!r} cannot be; use a finite number above 0, or None")
    if sinks_H is not None:
        check_axes(q_BTHD=q_BTHD, sinks_H=sinks_H)
        check_floating(sinks_H=sinks_H)
        check_same_device(q_BTHD=q_BTHD, sinks_H=sinks_H)


def check_loss_inputs(
    index_inputs: dict[str, Any], attention_inputs: dict[str, Tensor], **integers: Tensor
) -> dict[str, int]:
    """Both sides of the indexer's loss, and that they agree; returns the sizes of the axes."""
    check_same_dtype(q_BTJE=index_inputs["q_BTJE"], k_BSIE=index_inputs["k_BSIE"])
    check_index_inputs(**index_inputs, **integers)
    check_attention_inputs(attention_inputs, **integers)
    check_same_device(**index_inputs, **attention_inputs)
    return check_axes(**index_inputs, **attention_inputs)
