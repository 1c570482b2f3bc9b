"""The C++ kernels at each level of instructions, whichever of them this machine would choose."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from fulmen.errors import BackendError
from fulmen.ops.cpp import library
from fulmen.ops.cpp.abi import CPP_LEVELS
from fulmen.ops.cpp.library import CPP_LEVEL_VARIABLE, cpp_reason

EACH_LEVEL = [f"cpp-{level}" for level in CPP_LEVELS]


@contextmanager
def cpp_level(name: str) -> Iterator[None]:
    """By the library of `name`, one of EACH_LEVEL; skips where it cannot run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CPP_LEVEL_VARIABLE, name.removeprefix("cpp-"))
        _forget_library()
        try:
            _skip_where_it_cannot_run()
            yield
        finally:
            _forget_library()


def _skip_where_it_cannot_run() -> None:
    try:
        cpp_reason()
    except BackendError as error:
        pytest.skip(str(error))


def _forget_library() -> None:
    library._open_library.cache_clear()
    library._of_numbers.cache_clear()
