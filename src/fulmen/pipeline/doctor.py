"""What computes each operation on this machine, why not something faster, and versions."""

import os
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

from fulmen.errors import BackendError

LIBRARIES = ("fulmen", "torch", "transformers", "triton")


class Choice(NamedTuple):
    """What computes one operation.

    Attributes:
        backend: None where the pinned one cannot.
        against: for every other backend why it cannot; None: it could, and is not chosen here.
    """

    device: str
    operation: str
    dtype: str
    backend: str | None
    against: dict[str, str | None]


class Diagnosis(NamedTuple):
    """All that there is to say; `pin` is the value of FULMEN_BACKEND."""

    facts: dict[str, str]
    pin: str | None
    choices: list[Choice]


def diagnose() -> Diagnosis:
    """Ask about every operation on every device and dtype.

    Raises BackendError if FULMEN_BACKEND names no backend.
    """
    import torch

    from fulmen.ops.dispatch import (
        BACKEND_DTYPES,
        BACKEND_VARIABLE,
        BACKENDS,
        current_backend_name,
        operations,
    )

    pin = current_backend_name(os.environ.get(BACKEND_VARIABLE, "")) or None
    if pin and pin not in BACKENDS:
        raise BackendError(
            f"{BACKEND_VARIABLE}={pin!r} names no backend; set it to {', '.join(BACKENDS)}, or unset it"
        )
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    choices = [
        _choice(device, operation, dtype)
        for device in devices
        for operation in operations()
        for dtype in BACKEND_DTYPES
    ]
    return Diagnosis(_facts(), pin, choices)


def _choice(device: str, operation: str, dtype: Any) -> Choice:
    from fulmen.ops.dispatch import BACKENDS, reason_against_backend, resolve

    backend = None
    # A pinned one that cannot: its reason stands among those against the others.
    with suppress(BackendError):
        backend = resolve(operation, device, dtype)
    others = (name for name in BACKENDS if name != backend)
    against = {name: reason_against_backend(name, operation, device, dtype) for name in others}
    return Choice(device, operation, str(dtype).removeprefix("torch."), backend, against)


def _facts() -> dict[str, str]:
    import torch

    from fulmen.evaluation.provenance import processor_name
    from fulmen.ops.cpp.library import cpp_reason, cpp_simd
    from fulmen.ops.half_products import HALF, has_half_products

    reason = cpp_reason()
    facts = {name: _version(name) for name in ("python", *LIBRARIES)}
    facts["CPU"] = f"{processor_name()}, {os.cpu_count()} cores"
    facts["threads"] = str(torch.get_num_threads())
    facts["C++ kernels"] = (
        f"cannot run: {reason}" if reason else f"built for {', '.join(cpp_simd()) or 'no vector extension'}"
    )
    slow = [str(dtype).removeprefix("torch.") for dtype in HALF if not has_half_products(dtype)]
    facts["16-bit products"] = (
        f"{' and '.join(slow)} in float32, as this CPU has no instructions for them"
        if slow
        else "by the CPU's own instructions"
    )
    if torch.cuda.is_available():
        facts["GPU"] = torch.cuda.get_device_name()
    return facts


def _version(name: str) -> str:
    if name == "python":
        return platform.python_version()
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
