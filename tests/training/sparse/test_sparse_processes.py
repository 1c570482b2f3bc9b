"""Two processes over gloo, started by `accelerate launch`: the same losses and weights as one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.training.sparse.sparse_setup import fresh_model, log_rows, run

PATHS = [str(Path(__file__).parents[3])]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}

LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2"]
SCRIPT = """
import sys
sys.path[:0] = {paths!r}
from pathlib import Path
import torch
torch.set_num_threads(1)
from tests.training.sparse.sparse_setup import *
model = fresh_model().to(getattr(torch, sys.argv[2]))
run(Path(sys.argv[1]), model, n_rows=1000, steps=4, evaluations=2)
"""


def launch(script: Path, out: Path, dtype: str, *options: str) -> None:
    machine = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command = [*LAUNCH, *machine, "--main_process_port", "0", *options, str(script), str(out), dtype]
    done = subprocess.run(
        command,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture
def script(tmp_path) -> Path:
    file = tmp_path / "two.py"
    file.write_text(SCRIPT.format(paths=PATHS))
    return file


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch without gloo")
def test_two_processes_are_one_with_twice_the_texts(tmp_path, script):
    # Without a GPU, --multi_gpu starts gloo processes by torchrun; --cpu would ask for MPI.
    launch(script, tmp_path / "two", "float32", "--multi_gpu")
    run(tmp_path / "one", n_rows=1000, steps=4, evaluations=2, accumulate=2)
    one, two = log_rows(tmp_path / "one"), log_rows(tmp_path / "two")
    assert len(one) == len(two) == 4
    for ours, theirs in zip(one, two, strict=True):
        assert ours["tokens"] == theirs["tokens"]
        for name in ("loss", "lm", "kl", "indexer"):
            assert theirs[name] == pytest.approx(ours[name], rel=1e-4), name
    states = [load_file(tmp_path / name / "checkpoint-4" / "model.safetensors") for name in ("one", "two")]
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=1e-2, atol=2e-4)


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch without gloo")
def test_bf16_weights_sharded_by_fsdp2(tmp_path, script):
    """Weights travel in bfloat16; what is trained, summed and told is float32."""
    launch(script, tmp_path / "two", "bfloat16", "--use_fsdp", "--fsdp_version", "2")
    run(tmp_path / "one", fresh_model().bfloat16(), n_rows=1000, steps=4, evaluations=2, accumulate=2)
    for ours, theirs in zip(log_rows(tmp_path / "one"), log_rows(tmp_path / "two"), strict=True):
        for name in ("loss", "lm", "kl"):
            assert theirs[name] == pytest.approx(ours[name], rel=0.05), name
        loss = torch.tensor(theirs["loss"])
        assert loss != loss.bfloat16()
    saved = load_file(tmp_path / "two" / "checkpoint-4" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
