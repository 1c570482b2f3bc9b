"""A second device without a GPU: it computes on the CPU, and refuses, as a GPU does, what lies elsewhere.

Within `other_device()` tensors can be made on or moved to "elsewhere"; an operation on some of these and
some of the CPU's raises, but for copies and numbers (tensors without axes), which a GPU takes too.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _DummyPrivateUse1Hook,
    _setup_privateuseone_for_python_backend,
)

from fulmen.ops.dispatch import pin_backend

OTHER = "elsewhere"
aten = torch.ops.aten
library = torch.library.Library("aten", "IMPL")
# Operations that read one device and write another.
COPIES = {aten._to_copy.default, aten.copy_.default}
WRITING = {aten.copy_.default}
READING = {aten._local_scalar_dense.default}
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default}


class ElsewhereTensor(torch.Tensor):
    """A tensor on the other device; `held` is its numbers, on the CPU."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> "ElsewhereTensor":
        found = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(OTHER, 0),
        )
        found.held = held
        return found

    def __repr__(self) -> str:
        return f"ElsewhereTensor({self.held})"

    def tolist(self) -> Any:
        return self.held.tolist()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.held.untyped_storage()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class _Here(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class _TensorsOf(TorchFunctionMode):
    """`torch.tensor` copies to a device below what the other mode sees: here it moves."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.tensor and kwargs.get("device") is not None:
            return func(*args, **{**kwargs, "device": "cpu"}).to(kwargs["device"])
        return func(*args, **kwargs)


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The operation on the CPU; its result lies where its inputs or its `device` say."""
    if func is aten._pin_memory.default:
        return args[0]
    # A GPU's tensors are indexed by the CPU's as well.
    checked = (args[0], args[2:]) if func in INDEXING else args
    strays = [value for value in _tensors((checked, kwargs)) if not _is_there(value) and value.dim()]
    there = [value for value in _tensors((args, kwargs)) if _is_there(value)]
    if there and strays and func not in COPIES:
        raise RuntimeError(f"{func}: tensors on {OTHER} and, of shape {tuple(strays[0].shape)}, on cpu")
    device = kwargs.get("device")
    goes = _is_there(args[0]) if func in WRITING else bool(there) and func not in READING
    if device is not None:
        goes = torch.device(device).type == OTHER
        kwargs = {**kwargs, "device": "cpu"} if goes else kwargs
    found = func(*tree_map(_held, args), **tree_map(_held, kwargs))
    if not goes:
        return found
    known = {id(value.held): value for value in there}
    return tree_map(lambda value: known.get(id(value), _moved(value)), found)


def _tensors(values: Any) -> list[torch.Tensor]:
    return [value for value in tree_flatten(values)[0] if isinstance(value, torch.Tensor)]


def _is_there(value: Any) -> bool:
    return isinstance(value, ElsewhereTensor)


def _held(value: Any) -> Any:
    return value.held if isinstance(value, ElsewhereTensor) else value


def _moved(value: Any) -> Any:
    return ElsewhereTensor(value) if isinstance(value, torch.Tensor) else value


class _Device(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


class _Hook(_DummyPrivateUse1Hook):
    """Says that the device is there in the `with` block alone, lest others take it for the best there is."""

    present = False

    def is_available(self) -> bool:
        return self.present


@cache
def _registered() -> _Hook:
    hook = _Hook()
    _setup_privateuseone_for_python_backend(OTHER, backend_module=_Device(), hook=hook)
    # Some operations make their result below what a mode sees.
    for name in ("empty_strided", "empty.memory_format"):
        library.impl(name, partial(_empty, name), "PrivateUse1")
    library.impl("_copy_from", _copy_from, "PrivateUse1")
    return hook


def _copy_from(source: Any, target: Any, non_blocking: bool = False) -> Any:
    return run(aten.copy_.default, (target, source), {})


def _empty(name: str, *args: Any, **kwargs: Any) -> Any:
    base, _, overload = name.partition(".")
    return run(getattr(getattr(aten, base), overload or "default"), args, kwargs)


@contextmanager
def other_device() -> Iterator[str]:
    """The name of the device, which exists in the `with` block; operations are by torch alone there."""
    hook = _registered()
    hook.present = True
    try:
        with pin_backend("torch"), _Here(), _TensorsOf():
            yield OTHER
    finally:
        hook.present = False
