"""Which of the native libraries is used, and when none is."""

import ctypes
from pathlib import Path

import pytest
import torch

from fulmen.errors import BackendError
from fulmen.ops.cpp import library as cpp_library
from fulmen.ops.cpp.library import NATIVE_LEVEL_VARIABLE, NATIVE_LEVELS, native_reason, native_simd
from fulmen.ops.dispatch import resolve
from fulmen.ops.paged.layer import NativeLayer, NativeTokens
from tests.ops.native_levels import EACH_LEVEL, native_level

# As Linux names what each level needs beyond the one before.
NEEDS = {
    "plain": set(),
    "avx2": {"avx", "avx2", "fma", "bmi2"},
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
    "amx": {"avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16"},
}
# As the libraries name what they were built for.
BUILT_FOR = {"plain": set(), "avx2": {"AVX2", "FMA"}, "avx512": {"AVX512F"}, "amx": {"AMX_BF16"}}


def up_to(level, sets):
    """Those of a level and all below it."""
    levels = list(NATIVE_LEVELS)
    return set().union(*(sets[name] for name in levels[: levels.index(level) + 1]))


@pytest.fixture
def open_native(monkeypatch):
    """Opens the best library, or the one that a test pins, anew."""
    monkeypatch.delenv(NATIVE_LEVEL_VARIABLE, raising=False)
    return cpp_library._open_native.__wrapped__


@pytest.mark.parametrize("level", NATIVE_LEVELS)
def test_a_level_runs_exactly_where_the_cpu_has_its_instructions(level):
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    if "sse2" not in flags:
        pytest.skip("needs an x86 CPU and Linux")
    library, reason = cpp_library._open_level(level)
    if reason and "not built" in reason:
        pytest.skip(f"{level}: {reason}")
    assert (library is not None) == (up_to(level, NEEDS) <= flags)
    if library is None:
        assert "which this machine lacks" in reason


@pytest.mark.parametrize("name", EACH_LEVEL)
def test_a_pinned_level_is_the_one_that_runs(name):
    with native_level(name):
        built_for = set(native_simd())
    assert built_for & up_to("amx", BUILT_FOR) == up_to(name.removeprefix("native-"), BUILT_FOR)


def test_the_best_level_is_the_default(open_native):
    if reason := native_reason():
        pytest.skip(f"native: {reason}")
    runs = [level for level in NATIVE_LEVELS if cpp_library._open_level(level)[0]]
    with native_level(f"native-{runs[-1]}"):
        best = native_simd()
    assert open_native()[0].fulmen_native_simd().decode().split() == list(best)


def test_a_level_that_nobody_knows_is_refused_with_the_choices(open_native, monkeypatch):
    monkeypatch.setenv(NATIVE_LEVEL_VARIABLE, "sse9")
    with pytest.raises(BackendError, match="='sse9' names no level; set it to plain, avx2, avx512, amx"):
        open_native()


def test_a_pinned_level_that_cannot_run_is_refused_where_an_operation_starts(monkeypatch, tmp_path):
    monkeypatch.setenv(NATIVE_LEVEL_VARIABLE, "avx2")
    monkeypatch.setattr(cpp_library, "__file__", str(tmp_path / "native_library.py"))
    cpp_library._open_native.cache_clear()
    try:
        with pytest.raises(BackendError, match="='avx2' cannot run here: its library was not built"):
            resolve("index_topk", "cpu", torch.float32)
    finally:
        cpp_library._open_native.cache_clear()


def test_a_library_of_another_version_is_not_used(open_native, monkeypatch):
    monkeypatch.setattr(cpp_library, "NATIVE_VERSION", -1)
    library, reason = open_native()
    assert library is None
    assert "of another version" in reason


def test_a_file_that_is_no_library_is_not_used(open_native, monkeypatch, tmp_path):
    (tmp_path / "_native.so").write_text("nothing")
    monkeypatch.setattr(cpp_library, "__file__", str(tmp_path / "native_library.py"))
    monkeypatch.setattr(cpp_library, "EXTENSION_SUFFIXES", [".so"])
    assert "does not load" in open_native()[1]
    (tmp_path / "_native.so").unlink()
    assert "was not built" in open_native()[1]


def test_the_structures_have_the_sizes_that_the_kernels_read():
    assert ctypes.sizeof(cpp_library.IndexShape) == 14 * 8
    assert ctypes.sizeof(cpp_library.AttentionShape) == 17 * 8
    assert ctypes.sizeof(NativeLayer) == 17 * 8
    assert ctypes.sizeof(NativeTokens) == 7 * 8
