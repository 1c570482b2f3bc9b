"""`fulmen doctor` against what the dispatcher itself says."""

import ast
import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import fulmen
from fulmen.cli.main import app
from fulmen.errors import BackendError
from fulmen.ops import dispatch
from fulmen.ops.dispatch import BACKEND_DTYPES, BACKENDS, operations, reason_against_backend, resolve


@pytest.fixture(autouse=True)
def _no_pin_from_outside(monkeypatch):
    monkeypatch.delenv("FULMEN_BACKEND", raising=False)


def call(*arguments):
    return CliRunner().invoke(app, ["doctor", *arguments], env={"COLUMNS": "200"})


def choices():
    result = call("--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_every_operation_that_asks_for_a_backend_is_listed():
    asked = {
        node.args[0].value
        for path in (Path(fulmen.__file__).parent / "ops").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "implementation"
        if isinstance(node.args[0], ast.Constant)
    }
    assert asked == set(operations())


def test_json_is_what_the_dispatcher_says():
    found = choices()
    on_cpu = {(c["operation"], c["dtype"]): c for c in found["choices"] if c["device"] == "cpu"}
    assert len(on_cpu) == len(operations()) * len(BACKEND_DTYPES)
    for operation in operations():
        for dtype in BACKEND_DTYPES:
            choice = on_cpu[operation, str(dtype).removeprefix("torch.")]
            assert choice["backend"] == resolve(operation, "cpu", dtype)
            assert set(choice["against"]) == set(BACKENDS) - {choice["backend"]}
            for name, reason in choice["against"].items():
                assert reason == reason_against_backend(name, operation, "cpu", dtype)
    assert found["pin"] is None
    assert found["facts"]["torch"] == torch.__version__
    assert found["facts"]["threads"] == str(torch.get_num_threads())


def test_every_device_has_its_rows():
    devices = {choice["device"] for choice in choices()["choices"]}
    assert devices == ({"cpu", "cuda"} if torch.cuda.is_available() else {"cpu"})


def test_the_table_has_choices_and_reasons():
    result = call()
    assert result.exit_code == 0
    rows = [line.split() for line in result.stdout.splitlines()]
    for operation in operations():
        assert [operation, *(resolve(operation, "cpu", dtype) for dtype in BACKEND_DTYPES)] in rows
    assert "it has kernels for" in result.stdout


def test_brackets_of_a_reason_are_no_markup(monkeypatch):
    monkeypatch.setattr(dispatch, "triton_reason", lambda device: "pip install 'fulmen[gpu]'")
    assert "pip install 'fulmen[gpu]'" in call().stdout


def test_a_library_that_was_not_built(monkeypatch):
    monkeypatch.setattr("fulmen.ops.cpp.library.cpp_reason", lambda: "it was not built")
    monkeypatch.setattr(dispatch, "cpp_reason", lambda: "it was not built")
    result = call()
    assert "cannot run: it was not built" in result.stdout
    assert "cpp" not in {choice["backend"] for choice in choices()["choices"]}


def test_the_cpp_library_says_what_it_was_built_for():
    if reason := dispatch.cpp_reason():
        pytest.skip(f"cpp cannot run here: {reason}")
    words = choices()["facts"]["C++ kernels"]
    assert words.startswith("built for ")
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        pytest.skip("needs /proc/cpuinfo")
    has = set(cpuinfo.read_text().upper().replace("AVX512_", "AVX512").split())
    assert set(words.removeprefix("built for ").split(", ")) <= has | {"no vector extension", "NEON", "SVE"}


@pytest.mark.parametrize(
    ("supported", "words"),
    [
        ((torch.bfloat16, torch.float16), "by the CPU's own instructions"),
        ((torch.bfloat16,), "float16 in float32, as this CPU has no instructions for them"),
        ((), "bfloat16 and float16 in float32, as this CPU has no instructions for them"),
    ],
)
def test_16_bit_products_are_said(supported, words, monkeypatch):
    monkeypatch.setattr("fulmen.ops.half_products.has_half_products", lambda dtype: dtype in supported)
    assert choices()["facts"]["16-bit products"] == words


def test_a_pin_is_shown(monkeypatch):
    monkeypatch.setenv("FULMEN_BACKEND", "reference")
    found = choices()
    assert found["pin"] == "reference"
    assert {choice["backend"] for choice in found["choices"]} == {"reference"}
    result = call()
    assert "FULMEN_BACKEND=reference" in result.stdout
    assert "none:" not in result.stdout


def test_a_pin_that_cannot_run_is_said_and_is_no_error(monkeypatch):
    monkeypatch.setenv("FULMEN_BACKEND", "triton")
    found = choices()
    dense = [choice for choice in found["choices"] if choice["operation"] == "dense_attention"]
    assert {choice["backend"] for choice in dense} == {None}
    assert all("it has kernels for" in choice["against"]["triton"] for choice in dense)
    with pytest.raises(BackendError):
        resolve("dense_attention", "cpu", torch.float32)
    result = call()
    assert result.exit_code == 0
    assert "none: FULMEN_BACKEND=triton cannot compute this, and raises" in result.stdout


@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_a_pin_that_is_no_backend(arguments, monkeypatch):
    monkeypatch.setenv("FULMEN_BACKEND", "cuda")
    result = call(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: FULMEN_BACKEND='cuda' names no backend; set it to reference, torch, cpp")
