"""Which backend computes an operation: chosen by device and dtype, or pinned by the user.

Backends: "reference" (the specification, slow, everywhere) and "cpu" (blocked plain torch, any device).
A pin comes from `with pin_backend("reference"):` or, outside of one, from the variable FULMEN_BACKEND.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fulmen.errors import BackendError

BACKENDS = ("reference", "cpu")
BACKEND_VARIABLE = "FULMEN_BACKEND"
BACKEND_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# One for the whole process, not a ContextVar: a model's own checkpointing recomputes its forward in
# autograd's threads, and must meet the same backend there.
_pinned_backends: list[str] = []


def resolve(op_name: str, device: torch.device | str, dtype: torch.dtype) -> str:
    """Name of the backend for `op_name` on `device` with inputs of `dtype`.

    Raises BackendError, with the reason, if a pinned backend cannot run it (or no backend can).
    """
    name, origin = _pinned_or_default()
    reason = reason_against_backend(name, device, dtype)
    if reason:
        raise BackendError(f"backend {name!r} ({origin}) cannot run {op_name}: {reason}")
    return name


def reason_against_backend(name: str, device: torch.device | str, dtype: torch.dtype) -> str | None:
    """Why backend `name` cannot take tensors of `dtype` on `device`; None if it can."""
    if name not in BACKENDS:
        return f"there is no such backend; choose one of {', '.join(BACKENDS)}"
    if torch.device(device).type == "meta":
        return "tensors on device 'meta' hold no values; move the model to a real device"
    if dtype not in BACKEND_DTYPES:
        return f"dtype {dtype} is not one of {', '.join(str(known) for known in BACKEND_DTYPES)}"
    return None


@contextmanager
def pin_backend(name: str) -> Iterator[None]:
    """Compute every operation in this `with` block (all threads) by backend `name`.

    Raises BackendError at once if there is no such backend, and at the operation if it cannot run there.
    """
    if name not in BACKENDS:
        raise BackendError(f"backend {name!r} is not known; choose one of {', '.join(BACKENDS)}")
    _pinned_backends.append(name)
    try:
        yield
    finally:
        _pinned_backends.pop()


def _pinned_or_default() -> tuple[str, str]:
    if _pinned_backends:
        return _pinned_backends[-1], "pinned by pin_backend"
    if name := os.environ.get(BACKEND_VARIABLE):
        return name, f"pinned by {BACKEND_VARIABLE}"
    return "cpu", "the default"
