"""Two processes over gloo, started by `accelerate launch`: the same losses and weights as one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from sparse_setup import TRAIN, fresh_model, log_rows, run, settings
from test_sparse_stage import batch_of, gradients

from fulmen.training.sparse_run import prepare_stage

PATHS = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "modeling")]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}

# Without a GPU, --multi_gpu starts gloo processes by torchrun; --cpu would ask for MPI.
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
SCRIPT = """
import sys
sys.path[:0] = {paths!r}
from pathlib import Path
import torch
torch.set_num_threads(1)
from sparse_setup import *
run(Path(sys.argv[1]), n_rows=1000, steps=4, evaluations=2)
"""


def launch(script: Path, out: Path, *options: str) -> None:
    machine = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command = [*LAUNCH, *machine, "--main_process_port", "0", *options, str(script), str(out)]
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
    launch(script, tmp_path / "two")
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


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
SHARDED = """
import sys
sys.path[:0] = {paths!r}
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from sparse_setup import *
from test_sparse_stage import batch_of
from fulmen.training.sparse_run import prepare_stage
torch.set_num_threads(1)
dist.init_process_group("gloo")
model = fresh_model()
batches = [batch_of(model, text) for text in TRAIN[:2]]
stage = prepare_stage(model, settings(n_rows=1000, checkpointing=True))
mesh = init_device_mesh("cpu", (2,))
for layer in model.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(stage, mesh=mesh)
stage.train()(**batches[dist.get_rank()])["loss"].backward()
grads = {{name: p.grad.full_tensor() for name, p in stage.named_parameters()}}
stage.eval()
with torch.no_grad():
    lm = stage(**{{n: batches[0][n] for n in ("input_ids", "position_ids")}})["lm"]
if dist.get_rank() == 0:
    torch.save((grads, lm), sys.argv[1])
dist.destroy_process_group()
"""


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch without gloo")
def test_sharded_by_fsdp2_gives_the_same_gradients(tmp_path, script):
    """torch's own fully_shard, with checkpointing: Accelerate 1.15 runs DDP in its place on CPUs."""
    script.write_text(SHARDED.format(paths=PATHS))
    done = subprocess.run(
        [*TORCHRUN, str(script), str(tmp_path / "grads")],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    grads, lm = torch.load(tmp_path / "grads")
    model = fresh_model()
    batches = [batch_of(model, text) for text in TRAIN[:2]]
    stage = prepare_stage(model, settings(n_rows=1000))
    parts = [gradients(stage, batch) for batch in batches]
    assert grads.keys() == parts[0].keys()
    for name, gradient in grads.items():
        torch.testing.assert_close(gradient, (parts[0][name] + parts[1][name]) / 2, rtol=1e-3, atol=1e-5)
    with torch.no_grad():
        alone = stage.eval()(**{name: batches[0][name] for name in ("input_ids", "position_ids")})["lm"]
    torch.testing.assert_close(lm, alone)
