"""The native kernels; all else about the package is in pyproject.toml."""

import platform

from setuptools import Extension, setup

NATIVE = "src/fulmen/ops/native"
# For the machine that builds it; the library refuses to run on a lesser one (native/library.cpp).
MACHINE = "-march=native" if platform.machine().lower() in ("x86_64", "amd64", "i686") else "-mcpu=native"
SOURCES = (
    *("library", "index_keys", "index_topk", "attention", "attention_backward"),
    *("paged", "paged_project", "paged_sparse"),
)
HEADERS = (
    *("vectors", "tiles", "threads", "attention", "attention_tiles"),
    *("index_inputs", "index_vectors", "index_tiles", "index_query", "index_block", "selection", "paged"),
)

setup(
    ext_modules=[
        Extension(
            "fulmen.ops._native",
            sources=[f"{NATIVE}/{name}.cpp" for name in SOURCES],
            depends=[f"{NATIVE}/{name}.h" for name in HEADERS],
            extra_compile_args=["-std=c++17", "-O3", MACHINE, "-pthread"],
            extra_link_args=["-pthread"],
            # Without a compiler fulmen installs all the same, and computes by plain torch.
            optional=True,
        )
    ]
)
