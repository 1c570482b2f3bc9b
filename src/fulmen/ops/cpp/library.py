"""The native kernels: shared libraries beside this file, built when fulmen is installed (`cpp/src/*.cpp`).

There is one for each level of instructions, and the best that can run here is used. Called by ctypes, which
releases Python's lock meanwhile. Where none was built, `native_reason` says so, and the operations run by
plain torch.
"""

import ctypes
import os
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fulmen.errors import BackendError

# Each with its library, from the instructions that every CPU of a kind has to those that few have (setup.py).
NATIVE_LEVELS = {
    "plain": "_native",
    "avx2": "_native_avx2",
    "avx512": "_native_avx512",
    "amx": "_native_amx",
}
NATIVE_LEVEL_VARIABLE = "FULMEN_NATIVE_LEVEL"
NATIVE_VERSION = 9
# Numbers, as in `cpp/src/attention.h`: gradients have rows of whole vectors.
ROW_MULTIPLE = 16


class IndexShape(ctypes.Structure):
    """As in `cpp/src/index_inputs.h`."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            *("batch", "queries", "keys", "heads", "key_heads", "width", "topk", "columns"),
            *("key_kind", "k_stride_b", "k_stride_s", "k_stride_i", "threads", "use_tiles"),
        )
    ]


class AttentionShape(ctypes.Structure):
    """As in `cpp/src/attention.h`."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            *("batch", "queries", "keys", "heads", "key_heads", "width", "value_width", "topk"),
            *("is_bf16", "k_stride_b", "k_stride_s", "k_stride_g", "v_stride_b", "v_stride_s", "v_stride_g"),
            *("threads", "use_tiles"),
        )
    ]


def native_reason() -> str | None:
    """Why the native kernels cannot run on this machine; None if they can.

    Raises BackendError if FULMEN_NATIVE_LEVEL names no level, or one that cannot run here.
    """
    return _open_native()[1]


def native_simd() -> tuple[str, ...]:
    """Instruction sets that the library in use was built for, as ("AVX2", "FMA"); () where none can run."""
    library = _open_native()[0]
    return () if library is None else tuple(library.fulmen_native_simd().decode().split())


def has_tiles() -> bool:
    """Whether the native kernels may use the CPU's matrix tiles (Intel's AMX)."""
    library = _open_native()[0]
    return library is not None and bool(library.fulmen_native_tiles())


def call_native(function: str, *arguments: Any) -> None:
    """Call a kernel with tensors (or None), structures, arrays, integers and floats."""
    library = _open_native()[0]
    assert library is not None, "resolve() chooses native only where it can run"
    status = getattr(library, function)(*(_as_ctype(argument) for argument in arguments))
    if status:
        raise MemoryError(f"{function} ran out of memory")


def call_native_by_numbers(function: str, *numbers: int) -> None:
    """Call a kernel whose arguments are addresses and integers alone: less work in Python."""
    if _of_numbers(function, len(numbers))(*numbers):
        raise MemoryError(f"{function} ran out of memory")


@cache
def _of_numbers(function: str, count: int) -> Any:
    library = _open_native()[0]
    assert library is not None, "resolve() chooses native only where it can run"
    kernel = library[function]  # not shared with `call_native`
    kernel.argtypes = [ctypes.c_int64] * count
    return kernel


def row_major(x: Tensor) -> Tensor:
    """`x` itself if its last axis is contiguous, as kernels want it, else a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def kernel_floats(x: Tensor) -> Tensor:
    """Keys or values for a kernel: float32 and bfloat16 as they are, float16 as a float32 copy."""
    return row_major(x if x.dtype in (torch.float32, torch.bfloat16) else x.float())


def _as_ctype(argument: Any) -> Any:
    match argument:
        case None:
            return ctypes.c_void_p(None)
        case Tensor():
            return ctypes.c_void_p(argument.data_ptr())
        case ctypes.Structure() | ctypes.Array():
            return ctypes.byref(argument)
        case float():
            return ctypes.c_float(argument)
        case _:
            return ctypes.c_int64(argument)


@cache
def _open_native() -> tuple[ctypes.CDLL | None, str | None]:
    """The library of the pinned or else the best level, or why there is none."""
    if pinned := os.environ.get(NATIVE_LEVEL_VARIABLE):
        return _open_pinned_level(pinned), None
    for level in reversed(NATIVE_LEVELS):
        library, reason = _open_level(level)
        if library:
            break
    return library, reason


def _open_pinned_level(level: str) -> ctypes.CDLL:
    setting = f"{NATIVE_LEVEL_VARIABLE}={level!r}"
    if level not in NATIVE_LEVELS:
        raise BackendError(f"{setting} names no level; set it to {', '.join(NATIVE_LEVELS)}, or unset it")
    library, reason = _open_level(level)
    if library is None:
        raise BackendError(f"{setting} cannot run here: {reason}")
    return library


def _open_level(level: str) -> tuple[ctypes.CDLL | None, str | None]:
    places = (Path(__file__).with_name(f"{NATIVE_LEVELS[level]}{suffix}") for suffix in EXTENSION_SUFFIXES)
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        return None, "its library was not built; install fulmen where there is a C++ compiler"
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return None, f"its library does not load ({error}); install fulmen again"
    if library.fulmen_native_version() != NATIVE_VERSION:
        return None, "its library is of another version of fulmen; install fulmen again"
    library.fulmen_native_lacks.restype = library.fulmen_native_simd.restype = ctypes.c_char_p
    if lacking := library.fulmen_native_lacks():
        return None, f"its library needs {lacking.decode()}, which this machine lacks"
    return library, None
