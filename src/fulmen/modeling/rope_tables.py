"""One rotary table for all of a prompt, in however many pieces it is read.

Dynamic NTK and LongRoPE choose their angles by the length of the text. Transformers goes by the last
position of a forward pass: a prompt in pieces would be rotated by one table at first and by another at last.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig


def full_attention_rope(config: PreTrainedConfig) -> dict[str, Any]:
    """`rope_parameters`; where kinds of layers have their own, those of the layers that see all."""
    values = getattr(config, "rope_parameters", None) or {}
    own: dict[str, Any] = values.get("full_attention", values)
    return own


@contextmanager
def rope_for_length(model: nn.Module, length: int) -> Iterator[None]:
    """Within the block, a forward pass is rotated as part of a text of at least `length` tokens.

    Takes any Transformers language model that makes its tables in `rotary_emb`. What the model
    remembers of a length (dynamic NTK keeps the longest) is what one pass over the full text leaves.
    """
    rotary = _rotary(model)
    if rotary is None:
        yield
        return

    def see_the_end(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if "position_ids" in kwargs:
            return args, {**kwargs, "position_ids": _with_position(kwargs["position_ids"], length - 1)}
        x, position_ids, *more = args
        return (x, _with_position(position_ids, length - 1), *more), kwargs

    def forget_the_end(module: nn.Module, args: Any, table: Any) -> Any:
        return table[:, :-1] if isinstance(table, Tensor) else tuple(part[:, :-1] for part in table)

    hooks = (
        rotary.register_forward_pre_hook(see_the_end, with_kwargs=True),
        rotary.register_forward_hook(forget_the_end),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def restored_rope(model: nn.Module) -> Iterator[None]:
    """The tables' state at the start of the block is theirs again after it: no text leaves a trace.

    Dynamic NTK remembers the longest text: the next one, if shorter, would be rotated as that was.
    """
    holder = _holder(model)
    if holder is None:
        yield
        return
    rotary, holder.rotary_emb = holder.rotary_emb, _copy_of(holder.rotary_emb)
    try:
        yield
    finally:
        holder.rotary_emb = rotary


@torch.no_grad()
def rope_angles(model: nn.Module, length: int) -> Tensor | None:
    """The rotary tables' rows for position 1 in a text of `length` tokens; None for a model without tables.

    Two lengths with the same angles are rotated alike; caches of such sequences can be told by them. Asking
    leaves the model's own tables as they are.
    """
    rotary = _rotary(model)
    if rotary is None:
        return None
    # A table changes with what it is asked, so that the question goes to a copy.
    probe = _copy_of(rotary)
    device = next(probe.buffers()).device
    inputs = (torch.empty(0, device=device), torch.tensor([[1, max(length - 1, 1)]], device=device))
    # Some models have one table for each kind of layer.
    kinds = getattr(probe, "layer_types", None)
    tables = [probe(*inputs, kind) for kind in kinds] if kinds else [probe(*inputs)]
    # Cosine and sine, or one complex number.
    parts = [part for table in tables for part in ((table,) if isinstance(table, Tensor) else table)]
    return torch.cat([part[0, 0] for part in parts]).cpu()


def are_rotated_alike(model: nn.Module, length: int, other: int) -> bool:
    """Whether tokens that two sequences of these lengths share have the same rotation in both."""
    first, second = rope_angles(model, length), rope_angles(model, other)
    return first is second or (first is not None and second is not None and torch.equal(first, second))


def _holder(model: nn.Module) -> Any:
    """The module whose `rotary_emb` makes the tables, however the model is wrapped; None if there is none."""
    return next((module for module in model.modules() if "rotary_emb" in module._modules), None)


def _rotary(model: nn.Module) -> Any:
    return getattr(_holder(model), "rotary_emb", None)


def _copy_of(rotary: Any) -> Any:
    """Tables of the same state and the same config."""
    return copy.deepcopy(rotary, {id(rotary.config): rotary.config})


def _with_position(position_BT: Tensor, last: int) -> Tensor:
    return nn.functional.pad(position_BT, (0, 1), value=last)
