"""The C++ kernels; all else about the package is in pyproject.toml."""

import sysconfig
from copy import copy
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

FOLDER = "src/fulmen/ops/cpp/src"
SOURCES = (
    *("library", "index_keys", "index_topk", "attention", "attention_backward"),
    *("paged", "paged_project", "paged_sparse"),
)
HEADERS = (
    *("vectors", "tiles", "threads", "attention", "attention_tiles"),
    *("index_inputs", "index_codes", "index_vectors", "index_integers", "index_tiles", "index_query"),
    *("index_block", "selection", "paged"),
)
# A library for each level of instructions, the best of which is chosen when fulmen runs (ops/cpp/library.py).
# So what is built on one machine runs on any other of its kind, and every level is tested where it can run.
# ops/cpp/src/library.cpp asks the CPU for what is named here.
AVX2 = ("-mavx2", "-mfma", "-mbmi2")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni")
AMX = (*AVX512, "-mavx512bf16", "-mavx512fp16", "-mamx-tile", "-mamx-int8", "-mamx-bf16")
X86_LEVELS = {"_kernels_avx2": AVX2, "_kernels_avx512": AVX512, "_kernels_amx": AMX}
# Of the machine that is built for, which `_PYTHON_HOST_PLATFORM` names where it is another one.
IS_X86 = sysconfig.get_platform().lower().endswith(("x86_64", "amd64"))
LEVELS = {"_kernels": ()} | (X86_LEVELS if IS_X86 else {})


class BuildLevels(build_ext):
    """All levels at once, each with object files of its own."""

    def initialize_options(self):
        super().initialize_options()
        self.parallel = True

    def build_extension(self, extension):
        own = copy(self)
        own.build_temp = f"{self.build_temp}/{extension.name}"
        build_ext.build_extension(own, extension)

    def get_ext_filename(self, fullname):
        # They are called by ctypes, and are the same for every Python.
        return fullname.replace(".", "/") + ".so"


class AnyPythonWheel(bdist_wheel):
    """A wheel for one kind of machine and every Python 3."""

    def run(self):
        # A folder `build` from before has what was moved or deleted since; kernels alone are kept.
        build = Path(self.get_finalized_command("build").build_lib)
        for path in build.rglob("*"):
            if path.is_file() and (path.suffix != ".so" or path.stem not in LEVELS):
                path.unlink()
        super().run()

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


def kernels(name, instructions):
    return Extension(
        f"fulmen.ops.cpp.{name}",
        sources=[f"{FOLDER}/{source}.cpp" for source in SOURCES],
        depends=[f"{FOLDER}/{header}.h" for header in HEADERS],
        extra_compile_args=["-std=c++17", "-O3", "-g0", *instructions, "-pthread"],
        extra_link_args=["-pthread"],
        # Without a compiler fulmen installs all the same, and computes by plain torch; old ones lack a level.
        optional=True,
    )


setup(
    cmdclass={"build_ext": BuildLevels, "bdist_wheel": AnyPythonWheel},
    ext_modules=[kernels(*level) for level in LEVELS.items()],
)
