"""`two_level_topk` by the Triton kernels: on a GPU if there is one, else interpreted, hence small."""

import pytest
import torch

from fulmen.ops import dispatch
from fulmen.ops.dispatch import pin_backend, resolve
from fulmen.ops.triton_support import triton_reason
from fulmen.ops.two_level import two_level_topk
from tests.ops.ops_cases import causal, ragged
from tests.ops.two_level.test_two_level import case

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# J, I, E, M, N
SHAPE = (6, 2, 12, 3, 6)


@pytest.fixture(scope="module", autouse=True)
def _triton():
    if reason := triton_reason(DEVICE):
        pytest.skip(f"triton: {reason}")


@pytest.fixture
def _small_tiles(monkeypatch):
    """Several tiles and chunks."""
    from fulmen.ops import triton_kit
    from fulmen.ops.two_level import triton

    monkeypatch.setitem(triton_kit.KERNEL_SIZES["select"], "columns", 64)
    monkeypatch.setattr(triton, "HELD_SCORES", 2 * 110 * 3)


def selected(inputs, **limits):
    with pin_backend("triton"):
        return two_level_topk(**{name: x.to(DEVICE) for name, x in inputs.items()}, **limits).cpu()


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize(
    ("packed", "dtype", "intervals"),
    [(True, torch.bfloat16, ragged), (False, torch.float32, causal)],
)
def test_it_selects_as_the_reference(packed, dtype, intervals):
    """Some queries see nothing, some less than `all_up_to` keys; a coarse key and a query are no numbers."""
    inputs = case(SHAPE, 2, 7, 110, dtype, packed, intervals)
    if not packed:
        inputs["coarse_k_BSN"][:, 40, 3] = torch.nan
    inputs["coarse_q_BTMN"][1, 2, 0, 0] = torch.nan
    for limits in ({"topk": 5, "n_candidates": 12}, {"topk": 5, "n_candidates": 12, "all_up_to": 50}):
        with pin_backend("reference"):
            expected = two_level_topk(**inputs, **limits)
        assert torch.equal(selected(inputs, **limits), expected)


def test_it_is_the_default_on_a_gpu(monkeypatch):
    monkeypatch.setattr(dispatch, "_pinned_backends", [])
    monkeypatch.delenv("FULMEN_BACKEND", raising=False)
    monkeypatch.setattr(dispatch, "triton_reason", lambda device: None)
    assert resolve("two_level_topk", "cuda", torch.bfloat16) == "triton"
    assert resolve("two_level_topk", "cuda", torch.float64) == "torch"
