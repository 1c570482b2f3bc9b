"""Backends: the default, pins, and reasons."""

import pytest
import torch

from fulmen.errors import BackendError
from fulmen.ops.dispatch import pin_backend, resolve
from fulmen.ops.select_topk import select_topk

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_pin_from_outside(monkeypatch):
    monkeypatch.delenv("FULMEN_BACKEND", raising=False)


def test_default_and_pins(monkeypatch):
    assert resolve("index_topk", CPU, torch.float32) == "cpu"
    monkeypatch.setenv("FULMEN_BACKEND", "reference")
    assert resolve("index_topk", CPU, torch.float32) == "reference"
    with pin_backend("cpu"):
        assert resolve("index_topk", "cpu", torch.bfloat16) == "cpu"
        with pin_backend("reference"):
            assert resolve("index_topk", CPU, torch.float64) == "reference"
        assert resolve("index_topk", CPU, torch.float32) == "cpu"
    assert resolve("index_topk", CPU, torch.float32) == "reference"


def test_a_pin_ends_with_an_exception():
    with pytest.raises(RuntimeError, match="stop"), pin_backend("reference"):
        raise RuntimeError("stop")
    assert resolve("index_topk", CPU, torch.float32) == "cpu"


def test_unknown_backends_raise_with_the_choices(monkeypatch):
    with pytest.raises(BackendError, match=r"'triton' is not known.*reference, cpu"), pin_backend("triton"):
        pass
    monkeypatch.setenv("FULMEN_BACKEND", "cuda")
    with pytest.raises(BackendError, match=r"'cuda' \(pinned by FULMEN_BACKEND\) cannot run select_topk"):
        select_topk(torch.zeros(1, 1, 1), torch.tensor([[0]]), torch.tensor([[1]]), 1)


def test_what_no_backend_can_run_raises_with_the_reason():
    with pytest.raises(BackendError, match=r"torch\.float8_e4m3fn is not one of"):
        resolve("dense_attention", CPU, torch.float8_e4m3fn)
    with pytest.raises(BackendError, match="hold no values"):
        resolve("dense_attention", "meta", torch.float32)
