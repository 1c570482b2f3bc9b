"""Which backend computes an operation: chosen by device and dtype, or pinned by the user.

Backends: "reference" (the specification, slow, everywhere), "torch" (blocked plain torch, any device), "cpp"
(C++ kernels for the CPU, where the library was built) and "triton" (kernels for GPUs, where Triton is
installed). The last two are the default on their devices, for the operations that they have.
A pin comes from `with pin_backend("reference"):` or, outside of one, from the variable FULMEN_BACKEND.

Each implementation of an operation registers itself:

    @implements("index_topk", "cpp", dtypes=KERNEL_DTYPES)
    def index_topk_cpp(...): ...

An operation asks for the one that computes: `implementation("index_topk", device, dtype).run(...)`.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple, TypeVar

import torch

from fulmen.errors import BackendError
from fulmen.ops.common.notices import notice_once
from fulmen.ops.cpp.library import cpp_reason
from fulmen.ops.triton_support import triton_reason

Computes = TypeVar("Computes", bound=Callable[..., Any])

BACKENDS = ("reference", "torch", "cpp", "triton")
BACKEND_VARIABLE = "FULMEN_BACKEND"
# Names of an earlier release, understood with a notice.
OLD_BACKENDS = {"cpu": "torch", "native": "cpp"}
BACKEND_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Kernels compute in float32.
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Those that take the model's numbers as they lie in its caches.
CACHE_DTYPES = (torch.float32, torch.bfloat16)


class Implementation(NamedTuple):
    """How one backend computes one operation.

    Attributes:
        run: the function, which takes the operation's arguments.
        dtypes: of the first input.
        gradients: of attention, for what is compiled: as `fulmen.ops.common.opaque.AttentionGradients`.
    """

    backend: str
    run: Callable[..., Any]
    dtypes: tuple[torch.dtype, ...]
    gradients: Callable[..., Any] | None


# Of each operation, by backend.
IMPLEMENTATIONS: dict[str, dict[str, Implementation]] = {}

# One for the whole process, not a ContextVar: a model's own checkpointing recomputes its forward in
# autograd's threads, and must meet the same backend there.
_pinned_backends: list[str] = []


def implements(
    op_name: str,
    *backends: str,
    dtypes: tuple[torch.dtype, ...] = BACKEND_DTYPES,
    gradients: Callable[..., Any] | None = None,
) -> Callable[[Computes], Computes]:
    """Registers the decorated function as what computes `op_name` by these backends."""

    def register(run: Computes) -> Computes:
        for backend in backends:
            assert backend in BACKENDS, backend
            IMPLEMENTATIONS.setdefault(op_name, {})[backend] = Implementation(backend, run, dtypes, gradients)
        return run

    return register


def implements_by_name(op_name: str, backend: str, function: str, gradients: str | None = None) -> None:
    """The same for a function "module:name" whose module is imported when it computes first.

    Triton is optional, and a checkpoint's own copy of this source has none of its kernels.
    """
    lazy = _imported_on_use(gradients) if gradients else None
    implements(op_name, backend, dtypes=KERNEL_DTYPES, gradients=lazy)(_imported_on_use(function))


def _imported_on_use(function: str) -> Callable[..., Any]:
    module, _, name = function.partition(":")

    def run(*args: Any, **kwargs: Any) -> Any:
        return getattr(import_module(module), name)(*args, **kwargs)

    return run


def implementation(op_name: str, device: torch.device | str, dtype: torch.dtype) -> Implementation:
    """What computes `op_name` on `device` with inputs of `dtype`.

    Raises BackendError, with the reason, if a pinned backend cannot run it (or no backend can).
    """
    (name, origin), device = _pinned_or_default(), torch.device(device)
    if device.type == "cpu" and name != "triton":
        return _find_on_cpu(name, origin, op_name, device, dtype, cpp_reason())
    return _find(name, origin, op_name, device, dtype)


def resolve(op_name: str, device: torch.device | str, dtype: torch.dtype) -> str:
    """Name of the backend of `implementation`. Raises as it does."""
    return implementation(op_name, device, dtype).backend


@cache  # a decoding model asks for every layer of every token
def _find_on_cpu(
    name: str | None, origin: str, op_name: str, device: torch.device, dtype: torch.dtype, _cpp: str | None
) -> Implementation:
    """Kept by all that the answer depends on; `_cpp`: why the C++ kernels cannot run."""
    return _find(name, origin, op_name, device, dtype)


def _find(
    name: str | None, origin: str, op_name: str, device: torch.device, dtype: torch.dtype
) -> Implementation:
    if name is None:
        best = "cpp" if device.type == "cpu" else "triton"
        name = "torch" if reason_against_backend(best, op_name, device, dtype) else best
    if reason := reason_against_backend(name, op_name, device, dtype):
        raise BackendError(f"backend {name!r} ({origin}) cannot run {op_name}: {reason}")
    return IMPLEMENTATIONS[op_name][name]


def operations(backend: str | None = None) -> tuple[str, ...]:
    """Names of all operations, or of those that a backend has."""
    return tuple(sorted(op for op, found in IMPLEMENTATIONS.items() if backend is None or backend in found))


def reason_against_backend(
    name: str, op_name: str, device: torch.device | str, dtype: torch.dtype
) -> str | None:
    """Why backend `name` cannot run `op_name` on tensors of `dtype` on `device`; None if it can."""
    if name not in BACKENDS:
        return f"there is no such backend; choose one of {', '.join(BACKENDS)}"
    if torch.device(device).type == "meta":
        return "tensors on device 'meta' hold no values; move the model to a real device"
    if dtype not in BACKEND_DTYPES:
        return f"dtype {dtype} is not one of {', '.join(str(known) for known in BACKEND_DTYPES)}"
    if name not in IMPLEMENTATIONS[op_name]:
        return f"it has kernels for {', '.join(operations(name))} alone; pin 'torch' here"
    return _reason_against_kernels(name, op_name, device, dtype) if name in ("cpp", "triton") else None


def _reason_against_kernels(
    name: str, op_name: str, device: torch.device | str, dtype: torch.dtype
) -> str | None:
    if name == "cpp" and torch.device(device).type != "cpu":
        return f"its kernels run on the CPU, not on device {str(device)!r}; pin 'torch', which runs anywhere"
    if dtype == torch.float64:
        return "its kernels compute in float32, dtype torch.float64 needs more; pin 'torch'"
    if dtype not in (dtypes := IMPLEMENTATIONS[op_name][name].dtypes):
        known = " and ".join(str(one).removeprefix("torch.") for one in dtypes)
        return f"its kernel takes {known}, not dtype {dtype}; pin 'torch'"
    return cpp_reason() if name == "cpp" else triton_reason(device)


def current_backend_name(name: str) -> str:
    """The name of today for one of an earlier release, with a notice; any other name as it is."""
    if name not in OLD_BACKENDS:
        return name
    notice_once(
        f"the backend {name!r} is now {OLD_BACKENDS[name]!r}; the old name goes with the next release"
    )
    return OLD_BACKENDS[name]


@contextmanager
def pin_backend(name: str) -> Iterator[None]:
    """Compute every operation in this `with` block (all threads) by backend `name`.

    Raises BackendError at once if there is no such backend, and at the operation if it cannot run there.
    """
    name = current_backend_name(name)
    if name not in BACKENDS:
        raise BackendError(f"backend {name!r} is not known; choose one of {', '.join(BACKENDS)}")
    _pinned_backends.append(name)
    try:
        yield
    finally:
        _pinned_backends.pop()


def _pinned_or_default() -> tuple[str | None, str]:
    """A backend and who chose it; None: whichever is best."""
    if _pinned_backends:
        return _pinned_backends[-1], "pinned by pin_backend"
    if name := os.environ.get(BACKEND_VARIABLE):
        return current_backend_name(name), f"pinned by {BACKEND_VARIABLE}"
    return None, "the default"
