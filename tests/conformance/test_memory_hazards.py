"""Hazard 11: what a chunk of a prefill takes while it selects, C++ included."""

import re
from pathlib import Path

import pytest
import torch

from fulmen.ops.dispatch import pin_backend, reason_against_backend
from fulmen.ops.topk import index_topk
from tests.conformance.hazard_cases import TOPK
from tests.ops.ops_cases import normal

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
CHUNK = 1024
# What all of a chunk's scores would take at 16 K keys is 64 MiB.
MOST_BYTES = 24 * 2**20


def resident(name):
    return int(re.search(rf"{name}:\s+(\d+) kB", STATUS.read_text()).group(1)) * 1024


def peak_growth(run):
    """Bytes by which the process grew, at its largest, while `run` ran."""
    before = resident("VmRSS")
    CLEAR.write_text("5")  # the peak counts from here
    run()
    return resident("VmHWM") - before


def chunk_of(keys):
    q, k = normal(1, CHUNK, 1, 8), normal(1, keys, 1, 8, seed=1)
    w, b = normal(1, CHUNK, 1, seed=2), normal(1, CHUNK, 1, seed=3)
    stop = torch.arange(keys - CHUNK + 1, keys + 1)[None]
    return q, k, w, b, torch.zeros_like(stop), stop


@pytest.mark.skipif(not CLEAR.exists(), reason="the peak is measured by Linux's /proc")
@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_hazard_11_a_chunk_never_holds_all_of_its_scores(backend):
    """Mutations: n_rows = all queries in index_topk_blocked (ops/topk/torch_blocked.py); BLOCK_SCORES of
    1 << 40 and MOST_BLOCK_ROWS of 200 * ROWS (cpp/src/index_topk.cpp).
    """
    if reason := reason_against_backend(backend, "index_topk", "cpu", torch.float32):
        pytest.skip(f"{backend}: {reason}")
    with pin_backend(backend):
        index_topk(*chunk_of(4096), TOPK)  # libraries, threads, allocator
        for keys in (8192, 16384):
            inputs = chunk_of(keys)
            assert peak_growth(lambda: index_topk(*inputs, TOPK)) < MOST_BYTES  # noqa: B023
