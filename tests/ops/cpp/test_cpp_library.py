"""Which of the C++ libraries is used, and when none is."""

import ctypes
from pathlib import Path

import pytest
import torch

from fulmen.errors import BackendError
from fulmen.ops.common.notices import notice_once
from fulmen.ops.cpp import abi
from fulmen.ops.cpp import library as cpp_library
from fulmen.ops.cpp.abi import CPP_LEVELS, STRUCTURES, mismatched_structures, structure_layout
from fulmen.ops.cpp.library import CPP_LEVEL_VARIABLE, OLD_LEVEL_VARIABLE, cpp_reason, cpp_simd
from fulmen.ops.dispatch import resolve
from tests.ops.cpp_levels import EACH_LEVEL, cpp_level

# As Linux names what each level needs beyond the one before.
NEEDS = {
    "plain": set(),
    "avx2": {"avx", "avx2", "fma", "bmi2"},
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"},
    "amx": {"avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16"},
}
# As the libraries name what they were built for.
BUILT_FOR = {"plain": set(), "avx2": {"AVX2", "FMA"}, "avx512": {"AVX512F"}, "amx": {"AMX_BF16"}}


def up_to(level, sets):
    """Those of a level and all below it."""
    levels = list(CPP_LEVELS)
    return set().union(*(sets[name] for name in levels[: levels.index(level) + 1]))


@pytest.fixture
def open_library(monkeypatch):
    """Opens the best library, or the one that a test pins, anew."""
    monkeypatch.delenv(CPP_LEVEL_VARIABLE, raising=False)
    monkeypatch.delenv(OLD_LEVEL_VARIABLE, raising=False)
    return cpp_library._open_library.__wrapped__


@pytest.mark.parametrize("level", CPP_LEVELS)
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
    with cpp_level(name):
        built_for = set(cpp_simd())
    assert built_for & up_to("amx", BUILT_FOR) == up_to(name.removeprefix("cpp-"), BUILT_FOR)


def test_the_best_level_is_the_default(open_library):
    if reason := cpp_reason():
        pytest.skip(f"cpp: {reason}")
    runs = [level for level in CPP_LEVELS if cpp_library._open_level(level)[0]]
    with cpp_level(f"cpp-{runs[-1]}"):
        best = cpp_simd()
    assert open_library()[0].fulmen_simd().decode().split() == list(best)


def test_a_level_that_nobody_knows_is_refused_with_the_choices(open_library, monkeypatch):
    monkeypatch.setenv(CPP_LEVEL_VARIABLE, "sse9")
    with pytest.raises(BackendError, match="='sse9' names no level; set it to plain, avx2, avx512, amx"):
        open_library()


def test_a_pinned_level_that_cannot_run_is_refused_where_an_operation_starts(monkeypatch, tmp_path):
    monkeypatch.setenv(CPP_LEVEL_VARIABLE, "avx2")
    monkeypatch.setattr(cpp_library, "__file__", str(tmp_path / "library.py"))
    cpp_library._open_library.cache_clear()
    try:
        with pytest.raises(BackendError, match="='avx2' cannot run here: its library was not built"):
            resolve("index_topk", "cpu", torch.float32)
    finally:
        cpp_library._open_library.cache_clear()


def test_a_library_of_another_version_is_not_used(open_library, monkeypatch):
    monkeypatch.setattr(cpp_library, "ABI_VERSION", -1)
    library, reason = open_library()
    assert library is None
    assert "of another version" in reason


def test_a_file_that_is_no_library_is_not_used(open_library, monkeypatch, tmp_path):
    (tmp_path / "_kernels.so").write_text("nothing")
    monkeypatch.setattr(cpp_library, "__file__", str(tmp_path / "library.py"))
    assert "does not load" in open_library()[1]
    (tmp_path / "_kernels.so").unlink()
    assert "was not built" in open_library()[1]


def fields_swapped(structure):
    (one, *_), (other, *_), *_ = fields = list(structure._fields_)
    fields[:2] = [(other, fields[0][1]), (one, fields[1][1])]
    return fields


ALTERED = {
    "one more": lambda structure: [*structure._fields_, ("more", ctypes.c_int64)],
    "one less": lambda structure: structure._fields_[:-1],
    "swapped": fields_swapped,
    "of another kind": lambda structure: [
        (structure._fields_[0][0], ctypes.c_double),
        *structure._fields_[1:],
    ],
}


@pytest.mark.parametrize("altered", ALTERED)
@pytest.mark.parametrize("structure", STRUCTURES, ids=lambda structure: structure.__name__)
def test_a_library_with_another_structure_is_not_used(structure, altered, open_library, monkeypatch):
    if reason := cpp_reason():
        pytest.skip(f"cpp: {reason}")
    other = type(structure.__name__, (ctypes.Structure,), {"_fields_": ALTERED[altered](structure)})
    others = tuple(other if known is structure else known for known in STRUCTURES)
    monkeypatch.setattr(abi, "STRUCTURES", others)
    library, reason = open_library()
    assert library is None
    name = structure.__name__.removesuffix("Struct")
    assert f"is of another version of fulmen (it has {name} otherwise); install fulmen again" in reason


def test_the_structures_are_compared_by_name_order_and_kind():
    mine = "\n".join(map(structure_layout, STRUCTURES))
    assert mismatched_structures(mine) == []
    assert mismatched_structures(mine.replace("dense_up_to", "whole")) == ["PagedLayer"]
    assert mismatched_structures("") == [x.__name__.removesuffix("Struct") for x in STRUCTURES]


def test_the_variable_of_an_earlier_release_works_with_one_notice(open_library, monkeypatch, caplog):
    notice_once.cache_clear()
    monkeypatch.setenv(OLD_LEVEL_VARIABLE, "sse9")
    for _ in range(2):
        with pytest.raises(BackendError, match="='sse9' names no level; set it to plain, avx2, avx512, amx"):
            open_library()
    assert [record.message for record in caplog.records] == [
        "FULMEN_NATIVE_LEVEL is now FULMEN_CPP_LEVEL; the old name goes with the next release"
    ]
    monkeypatch.setenv(CPP_LEVEL_VARIABLE, "sse10")
    with pytest.raises(BackendError, match="FULMEN_CPP_LEVEL='sse10' names no level"):
        open_library()
