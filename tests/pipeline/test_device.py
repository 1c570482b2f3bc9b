"""Conversion, training and evaluation on another device than the CPU: nothing is left behind there."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file

import fulmen
from fulmen.errors import ConfigError
from tests.fork_server import Forked
from tests.pipeline.tiny_runs import LENGTH

ASKED = {"topk": 8, "length": LENGTH, "stages": "inherit,warmup,sparse", "steps": 2, "sparse_steps": 2}
EVALUATED = {"length": LENGTH, "sequences": 1, "quick": True}
# In a process of its own: torch counts the devices once, when it first takes a gradient.
PROGRAM = """
import json, os, sys
from tests.other_device import OTHER, other_device
os.environ["ACCELERATE_TORCH_DEVICE"] = OTHER
import fulmen
from fulmen.pipeline import evaluate_lookups
# As in this folder's other tests.
evaluate_lookups.QUICK = evaluate_lookups.QUICK._replace(texts=1, n_keys=2)
source, data, out, asked, evaluated = sys.argv[1:]
with other_device() as device:
    made = fulmen.convert(source, out=out, data=data, device=device, **json.loads(asked))
    report = fulmen.evaluate(made, data=data, device=device, **json.loads(evaluated))
print(json.dumps(report.summary()))
"""


def test_all_that_is_run_there_gives_what_it_gives_here(llama_dir, corpus_dir, tmp_path):
    arguments = (llama_dir, corpus_dir, tmp_path / "there", json.dumps(ASKED), json.dumps(EVALUATED))
    program = Forked(PROGRAM, *arguments)
    printed, errors = program.communicate()
    assert program.returncode == 0, errors
    here = fulmen.convert(llama_dir, out=tmp_path / "here", data=corpus_dir, device="cpu", **ASKED)
    found = load_file(tmp_path / "there" / "model.safetensors")
    for name, tensor in load_file(here.path / "model.safetensors").items():
        torch.testing.assert_close(found[name], tensor, atol=1e-4, rtol=1e-3, msg=name)
    report = fulmen.evaluate(tmp_path / "there", data=corpus_dir, device="cpu", **EVALUATED)
    elsewhere, at_home = json.loads(printed), report.summary()
    assert [list(map(words, row)) for row in elsewhere] == [list(map(words, row)) for row in at_home]
    # Sums in another order may round the last digit shown otherwise.
    for ours, theirs in zip(elsewhere, at_home, strict=True):
        assert list(map(numbers, ours)) == [pytest.approx(numbers(cell), abs=0.0101) for cell in theirs]


def words(cell: str) -> str:
    return re.sub(r"[0-9.]+", "#", cell)


def numbers(cell: str) -> list[float]:
    return [float(number) for number in re.findall(r"[0-9]+(?:\.[0-9]+)?", cell)]


@pytest.mark.parametrize("device", ["cuda:7", "gpu", "meta", 3, "cpu:x"])
def test_a_device_that_is_not_here_is_refused_before_any_work(device, tmp_path):
    for call in (fulmen.convert, fulmen.train):
        with pytest.raises(ConfigError, match="device="):
            call("nowhere", out=tmp_path / "out", device=device)
    for more in ({}, {"suites": "ruler"}):
        with pytest.raises(ConfigError, match="device="):
            fulmen.evaluate("nowhere", device=device, **more)
