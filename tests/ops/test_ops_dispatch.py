"""Backends: the default, pins, and reasons."""

import pytest
import torch

from fulmen.errors import BackendError
from fulmen.ops import dispatch
from fulmen.ops.common.notices import notice_once
from fulmen.ops.dispatch import (
    IMPLEMENTATIONS,
    KERNEL_DTYPES,
    implementation,
    implements,
    operations,
    pin_backend,
    resolve,
)
from fulmen.ops.topk import select_topk
from tests.fork_server import Forked

CPU = torch.device("cpu")
NOT_BUILT = "its library was not built; install fulmen where there is a C++ compiler"


@pytest.fixture(autouse=True)
def _no_pin_from_outside(monkeypatch):
    monkeypatch.delenv("FULMEN_BACKEND", raising=False)
    # As if built or not, whichever machine tests: what is chosen must not depend on it here.
    monkeypatch.setattr(dispatch, "cpp_reason", lambda: NOT_BUILT)


@pytest.fixture
def _cpp_is_built(monkeypatch):
    monkeypatch.setattr(dispatch, "cpp_reason", lambda: None)


def test_default_and_pins(monkeypatch):
    assert resolve("index_topk", CPU, torch.float32) == "torch"
    monkeypatch.setenv("FULMEN_BACKEND", "reference")
    assert resolve("index_topk", CPU, torch.float32) == "reference"
    with pin_backend("torch"):
        assert resolve("index_topk", "cpu", torch.bfloat16) == "torch"
        with pin_backend("reference"):
            assert resolve("index_topk", CPU, torch.float64) == "reference"
        assert resolve("index_topk", CPU, torch.float32) == "torch"
    assert resolve("index_topk", CPU, torch.float32) == "reference"


@pytest.mark.parametrize(("old", "new"), [("cpu", "torch"), ("native", "cpp")])
@pytest.mark.usefixtures("_cpp_is_built")
def test_names_of_an_earlier_release_work_with_one_notice(old, new, monkeypatch, caplog):
    notice_once.cache_clear()
    monkeypatch.setenv("FULMEN_BACKEND", old)
    for _ in range(2):
        assert resolve("index_topk", CPU, torch.float32) == new
    with pin_backend(old):
        assert resolve("index_topk", CPU, torch.float32) == new
    assert [record.message for record in caplog.records] == [
        f"the backend {old!r} is now {new!r}; the old name goes with the next release"
    ]


def test_a_notice_is_one_line_on_stderr():
    program = """
import torch
from fulmen.ops.dispatch import resolve
print(resolve("indexer_loss", "cpu", torch.float32))
"""
    printed, said = Forked(program, environment={"FULMEN_BACKEND": "cpu"}).communicate()
    assert printed == "torch\n"
    assert said == "the backend 'cpu' is now 'torch'; the old name goes with the next release\n"


def test_a_pin_ends_with_an_exception():
    with pytest.raises(RuntimeError, match="stop"), pin_backend("reference"):
        raise RuntimeError("stop")
    assert resolve("index_topk", CPU, torch.float32) == "torch"


def test_unknown_backends_raise_with_the_choices(monkeypatch):
    with (
        pytest.raises(BackendError, match=r"'cuda' is not known.*reference, torch, cpp, triton"),
        pin_backend("cuda"),
    ):
        pass
    monkeypatch.setenv("FULMEN_BACKEND", "cuda")
    with pytest.raises(BackendError, match=r"'cuda' \(pinned by FULMEN_BACKEND\) cannot run select_topk"):
        select_topk(torch.zeros(1, 1, 1), torch.tensor([[0]]), torch.tensor([[1]]), 1)


def test_what_no_backend_can_run_raises_with_the_reason():
    with pytest.raises(BackendError, match=r"torch\.float8_e4m3fn is not one of"):
        resolve("dense_attention", CPU, torch.float8_e4m3fn)
    with pytest.raises(BackendError, match="hold no values"):
        resolve("dense_attention", "meta", torch.float32)


@pytest.mark.usefixtures("_cpp_is_built")
def test_cpp_is_the_default_where_it_has_a_kernel():
    for name in ("index_scores", "select_topk", "index_topk", "sparse_attention", "dense_attention"):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert resolve(name, CPU, dtype) == "cpp"
    assert resolve("indexer_loss", CPU, torch.float32) == "torch"
    assert resolve("index_topk", CPU, torch.float64) == "torch"
    assert resolve("index_topk", "cuda", torch.float32) == "torch"


@pytest.mark.usefixtures("_cpp_is_built")
def test_pinned_cpp_raises_where_it_has_no_kernel():
    for name, device, dtype, reason in [
        ("indexer_loss", CPU, torch.float32, "it has kernels for .*index_scores, .* alone"),
        ("index_topk", "cuda", torch.float32, "its kernels run on the CPU, not on device 'cuda'"),
        ("index_topk", CPU, torch.float64, r"compute in float32, dtype torch\.float64 needs more"),
    ]:
        with pytest.raises(BackendError, match=reason), pin_backend("cpp"):
            resolve(name, device, dtype)


def test_pinned_cpp_that_was_not_built_raises_with_the_reason():
    reason = "cannot run index_topk: its library was not built"
    with pytest.raises(BackendError, match=reason), pin_backend("cpp"):
        resolve("index_topk", CPU, torch.float32)


def test_every_operation_has_a_specification_and_plain_torch():
    assert len(operations()) == 17
    assert operations("reference") == operations("torch") == operations()
    # By block tables alone: the CPU takes the rows of each request.
    by_blocks = {"attend_requests", "reserve_workspace"}
    losses = {"indexer_loss", "indexer_loss_selected", "selection_loss"}
    assert losses < set(operations("triton"))
    assert set(operations("triton")) - by_blocks - losses < set(operations("cpp"))
    assert set(operations("cpp")) == set(operations()) - by_blocks - losses


@pytest.mark.usefixtures("_cpp_is_built")
def test_a_backend_registers_its_implementation_with_its_dtypes(monkeypatch):
    monkeypatch.setattr(dispatch, "IMPLEMENTATIONS", {**IMPLEMENTATIONS})

    @implements("double", "reference", "torch")
    def double_plainly(x):
        return x + x

    @implements("double", "cpp", dtypes=KERNEL_DTYPES[:1])
    def double_fast(x):
        return 2 * x

    assert implementation("double", CPU, torch.float32).run is double_fast
    assert implementation("double", CPU, torch.bfloat16).run is double_plainly
    with pytest.raises(BackendError, match=r"takes float32, not dtype torch\.bfloat16"), pin_backend("cpp"):
        implementation("double", CPU, torch.bfloat16)
    with pytest.raises(BackendError, match=r"it has kernels for .* alone"), pin_backend("triton"):
        implementation("double", CPU, torch.float32)
