"""The native kernels at each level of instructions, whichever of them this machine would choose."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from fulmen.errors import BackendError
from fulmen.ops.cpp import library
from fulmen.ops.cpp.library import NATIVE_LEVEL_VARIABLE, NATIVE_LEVELS, native_reason

EACH_LEVEL = [f"native-{level}" for level in NATIVE_LEVELS]


@contextmanager
def native_level(name: str) -> Iterator[None]:
    """By the library of `name`, one of EACH_LEVEL; skips where it cannot run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(NATIVE_LEVEL_VARIABLE, name.removeprefix("native-"))
        _forget_library()
        try:
            _skip_where_it_cannot_run()
            yield
        finally:
            _forget_library()


def _skip_where_it_cannot_run() -> None:
    try:
        native_reason()
    except BackendError as error:
        pytest.skip(str(error))


def _forget_library() -> None:
    library._open_native.cache_clear()
    library._of_numbers.cache_clear()
