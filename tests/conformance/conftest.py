"""Every backend in turn, cpp at each level; the tests of an operation run by all of them."""

import pytest
import torch

from fulmen.ops.dispatch import BACKENDS, pin_backend, reason_against_backend
from tests.ops.cpp_levels import EACH_LEVEL, cpp_level


@pytest.fixture(params=[name for name in BACKENDS if name != "cpp"] + EACH_LEVEL)
def backend(request):
    if request.param in EACH_LEVEL:
        with cpp_level(request.param), pin_backend("cpp"):
            yield "cpp"
        return
    if reason := reason_against_backend(request.param, "index_topk", "cpu", torch.float32):
        pytest.skip(f"{request.param}: {reason}")
    with pin_backend(request.param):
        yield request.param


@pytest.fixture(params=["float64", "float32", "bfloat16", "float16"])
def dtype(request, backend):
    found = getattr(torch, request.param)
    if reason := reason_against_backend(backend, "index_topk", "cpu", found):
        pytest.skip(f"{backend}: {reason}")
    if backend == "triton" and found == torch.float16:
        pytest.skip("interpreted, float16 is as bfloat16")
    return found
