"""Which backend computes an operation: chosen by device and dtype, or pinned by the user.

Backends: "reference" (the specification, slow, everywhere), "torch" (blocked plain torch, any device), "cpp"
(C++ kernels for the CPU, where the library was built) and "triton" (kernels for GPUs, where Triton is
installed). The last two are the default on their devices, for the operations that they have.
A pin comes from `with pin_backend("reference"):` or, outside of one, from the variable FULMEN_BACKEND.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

from fulmen.errors import BackendError
from fulmen.ops.common.notices import notice_once
from fulmen.ops.cpp.library import cpp_reason
from fulmen.ops.triton_support import triton_reason

BACKENDS = ("reference", "torch", "cpp", "triton")
BACKEND_VARIABLE = "FULMEN_BACKEND"
# Names of an earlier release, understood with a notice.
OLD_BACKENDS = {"cpu": "torch", "native": "cpp"}
BACKEND_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
OPERATIONS = (
    *("index_scores", "select_topk", "index_topk", "sparse_attention", "dense_attention"),
    *("indexer_loss", "indexer_loss_selected", "selection_loss"),
    *("store_index_keys", "store_tokens", "project_and_store", "paged_decode"),
    "paged_sparse_attention",
)
# The others, and float64: there "torch" is the default, and pinning one of these raises.
KERNEL_OPERATIONS = {
    "cpp": (
        *("index_scores", "select_topk", "index_topk", "sparse_attention", "dense_attention"),
        *("store_index_keys", "store_tokens", "project_and_store", "paged_decode"),
        "paged_sparse_attention",
    ),
    "triton": ("index_scores", "select_topk", "index_topk", "sparse_attention"),
}
# Their kernels take the model's numbers as they lie in its caches.
WITHOUT_FLOAT16 = ("store_tokens", "project_and_store", "paged_decode", "paged_sparse_attention")

# One for the whole process, not a ContextVar: a model's own checkpointing recomputes its forward in
# autograd's threads, and must meet the same backend there.
_pinned_backends: list[str] = []


def resolve(op_name: str, device: torch.device | str, dtype: torch.dtype) -> str:
    """Name of the backend for `op_name` on `device` with inputs of `dtype`.

    Raises BackendError, with the reason, if a pinned backend cannot run it (or no backend can).
    """
    (name, origin), device = _pinned_or_default(), torch.device(device)
    if device.type == "cpu" and name != "triton":
        return _resolve_on_cpu(name, origin, op_name, device, dtype, cpp_reason())
    return _resolve(name, origin, op_name, device, dtype)


@cache  # a decoding model asks for every layer of every token
def _resolve_on_cpu(
    name: str | None, origin: str, op_name: str, device: torch.device, dtype: torch.dtype, _cpp: str | None
) -> str:
    """Kept by all that the answer depends on; `_cpp`: why the C++ kernels cannot run."""
    return _resolve(name, origin, op_name, device, dtype)


def _resolve(name: str | None, origin: str, op_name: str, device: torch.device, dtype: torch.dtype) -> str:
    if name is None:
        best = "cpp" if device.type == "cpu" else "triton"
        name = "torch" if reason_against_backend(best, op_name, device, dtype) else best
    if reason := reason_against_backend(name, op_name, device, dtype):
        raise BackendError(f"backend {name!r} ({origin}) cannot run {op_name}: {reason}")
    return name


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
    return _reason_against_kernels(name, op_name, device, dtype) if name in KERNEL_OPERATIONS else None


def _reason_against_kernels(
    name: str, op_name: str, device: torch.device | str, dtype: torch.dtype
) -> str | None:
    if op_name not in KERNEL_OPERATIONS[name]:
        return f"it has kernels for {', '.join(KERNEL_OPERATIONS[name])} alone; pin 'torch' here"
    if name == "cpp" and torch.device(device).type != "cpu":
        return f"its kernels run on the CPU, not on device {str(device)!r}; pin 'torch', which is plain torch"
    if dtype == torch.float64:
        return "its kernels compute in float32, dtype torch.float64 needs more; pin 'torch'"
    if dtype == torch.float16 and op_name in WITHOUT_FLOAT16:
        return "its kernel takes float32 and bfloat16, not dtype torch.float16; pin 'torch'"
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
