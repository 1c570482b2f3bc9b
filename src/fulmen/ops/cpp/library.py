"""The C++ kernels: shared libraries beside this file, built when fulmen is installed (`cpp/src/*.cpp`).

There is one for each level of instructions, and the best that can run here is used. Called by ctypes, which
releases Python's lock meanwhile. Where none was built, `cpp_reason` says so, and the operations run by
plain torch.
"""

import ctypes
import os
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fulmen.errors import BackendError
from fulmen.ops.common.notices import notice_once
from fulmen.ops.cpp.abi import ABI_VERSION, CPP_LEVELS, mismatched_structures

CPP_LEVEL_VARIABLE = "FULMEN_CPP_LEVEL"
OLD_LEVEL_VARIABLE = "FULMEN_NATIVE_LEVEL"


def cpp_reason() -> str | None:
    """Why the C++ kernels cannot run on this machine; None if they can.

    Raises BackendError if FULMEN_CPP_LEVEL names no level, or one that cannot run here.
    """
    return _open_library()[1]


def cpp_simd() -> tuple[str, ...]:
    """Instruction sets that the library in use was built for, as ("AVX2", "FMA"); () where none can run."""
    library = _open_library()[0]
    return () if library is None else tuple(library.fulmen_simd().decode().split())


def has_tiles() -> bool:
    """Whether the C++ kernels may use the CPU's matrix tiles (Intel's AMX)."""
    library = _open_library()[0]
    return library is not None and bool(library.fulmen_has_tiles())


def call_cpp(function: str, *arguments: Any) -> None:
    """Call a kernel with tensors (or None), structures, arrays, integers and floats."""
    library = _open_library()[0]
    assert library is not None, "resolve() chooses cpp only where it can run"
    status = getattr(library, function)(*(_as_ctype(argument) for argument in arguments))
    if status:
        raise MemoryError(f"{function} ran out of memory")


def call_cpp_by_numbers(function: str, *numbers: int) -> None:
    """Call a kernel whose arguments are addresses and integers alone: less work in Python."""
    if _of_numbers(function, len(numbers))(*numbers):
        raise MemoryError(f"{function} ran out of memory")


@cache
def _of_numbers(function: str, count: int) -> Any:
    library = _open_library()[0]
    assert library is not None, "resolve() chooses cpp only where it can run"
    kernel = library[function]  # not shared with `call_cpp`
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
def _open_library() -> tuple[ctypes.CDLL | None, str | None]:
    """The library of the pinned or else the best level, or why there is none."""
    if pinned := _pinned_level():
        return _open_pinned_level(pinned), None
    for level in reversed(CPP_LEVELS):
        library, reason = _open_level(level)
        if library:
            break
    return library, reason


def _pinned_level() -> str | None:
    if pinned := os.environ.get(CPP_LEVEL_VARIABLE):
        return pinned
    if pinned := os.environ.get(OLD_LEVEL_VARIABLE):
        notice_once(
            f"{OLD_LEVEL_VARIABLE} is now {CPP_LEVEL_VARIABLE}; the old name goes with the next release"
        )
    return pinned


def _open_pinned_level(level: str) -> ctypes.CDLL:
    setting = f"{CPP_LEVEL_VARIABLE}={level!r}"
    if level not in CPP_LEVELS:
        raise BackendError(f"{setting} names no level; set it to {', '.join(CPP_LEVELS)}, or unset it")
    library, reason = _open_level(level)
    if library is None:
        raise BackendError(f"{setting} cannot run here: {reason}")
    return library


def _open_level(level: str) -> tuple[ctypes.CDLL | None, str | None]:
    path = Path(__file__).with_name(f"{CPP_LEVELS[level]}.so")
    if not path.is_file():
        return None, "its library was not built; install fulmen where there is a C++ compiler"
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return None, f"its library does not load ({error}); install fulmen again"
    if reason := _reason_against_abi(library):
        return None, f"its library is of another version of fulmen ({reason}); install fulmen again"
    library.fulmen_lacks.restype = library.fulmen_simd.restype = ctypes.c_char_p
    if lacking := library.fulmen_lacks():
        return None, f"its library needs {lacking.decode()}, which this machine lacks"
    return library, None


def _reason_against_abi(library: ctypes.CDLL) -> str | None:
    """What a library has otherwise than `abi.py`; None: nothing."""
    version = getattr(library, "fulmen_abi_version", None)
    if version is None or version() != ABI_VERSION:
        return f"{version() if version else 'an unknown one'}, not {ABI_VERSION}"
    library.fulmen_layouts.restype = ctypes.c_char_p
    if mismatched := mismatched_structures(library.fulmen_layouts().decode()):
        return f"it has {', '.join(mismatched)} otherwise"
    return None
