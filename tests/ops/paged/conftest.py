"""Triton's kernels at sizes that can be interpreted."""

import pytest

from fulmen.ops.triton_support import triton_reason
from tests.ops.paged.request_cases import DEVICE


@pytest.fixture(scope="module")
def triton_runs():
    if reason := triton_reason(DEVICE):
        pytest.skip(f"triton: {reason}")


@pytest.fixture
def small_tiles(monkeypatch):
    """Several tiles, rounds and parts."""
    from fulmen.ops import triton_kit
    from fulmen.ops.paged import triton_attend

    in_columns = [
        name for name, x in triton_kit.KERNEL_SIZES.items() if name.startswith("paged") and "columns" in x
    ]
    for name in in_columns:
        monkeypatch.setitem(triton_kit.KERNEL_SIZES[name], "columns", 32)
    monkeypatch.setattr(triton_attend, "PART_KEYS", 5)
