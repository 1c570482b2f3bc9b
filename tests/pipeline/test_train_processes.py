"""`fulmen train` sharded by FSDP2 over two processes, killed on its way: the same as one process."""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from fulmen.errors import ConfigError
from fulmen.pipeline.run_dir import RunDir
from fulmen.training.checkpoints import last_complete_checkpoint
from tests.fork_server import Forked
from tests.modeling.gqa.tiny_gqa import make_dense
from tests.pipeline.test_train import train_settings, weights
from tests.pipeline.tiny_runs import convert, save_tiny, settings, train
from tests.training.forks import launchers_environment, two_ranks

LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1"]
LAUNCH += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
FSDP2 = ["--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"]
# fulmen, whose first process dies after the third step.
KILLED = """
import os, signal
from fulmen.training.sparse.trainer import StepWatch
end = StepWatch.on_step_end
def die(self, args, state, *rest, **more):
    end(self, args, state, *rest, **more)
    if state.global_step == 3 and self.writes:
        os.kill(os.getpid(), signal.SIGKILL)
StepWatch.on_step_end = die
from fulmen.cli.main import main
main()
"""
OPTIONS = {"steps": 4, "learning_rate": 1e-3, "save_every": 1}


def launch(*command: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*LAUNCH, *FSDP2, *command], env=environment, capture_output=True, text=True, timeout=400
    )


@pytest.fixture(scope="module")
def tied_dir(tmp_path_factory, corpus_dir) -> Path:
    """A converted model whose output embedding is its input embedding."""
    folder = tmp_path_factory.mktemp("tied")
    source = save_tiny(make_dense("llama3-rope"), folder / "dense")
    return convert(settings(source, folder / "out", corpus_dir, stages=("inherit",), steps=None))


def log_of(model_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (model_dir / "stages" / "sparse.jsonl").read_text().splitlines()]


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch without gloo")
def test_fsdp2_killed_and_resumed_is_one_process_with_twice_the_texts(tmp_path, corpus_dir, tied_dir):
    out = tmp_path / "two"
    arguments = ["train", str(tied_dir), "--out", str(out), "--data", str(corpus_dir), "--length", "64"]
    arguments += ["--steps", "4", "--lr", "1e-3", "--save-every", "1", "--checkpointing"]
    launcher = launchers_environment(*FSDP2)
    first, second = (Forked(KILLED, *arguments, environment={**launcher, **rank}) for rank in two_ranks())
    assert first.wait(timeout=400) == -signal.SIGKILL, first.communicate()[1]
    with suppress(ProcessLookupError):  # It may have heard of it.
        os.kill(second.pid, signal.SIGTERM)
    second.wait(timeout=400)
    last = Path(last_complete_checkpoint(RunDir(out).path / "sparse"))
    assert last.name == "checkpoint-2"
    # FSDP's own files: Accelerate did not fall back on DDP.
    assert {"pytorch_model_fsdp_0", "optimizer_0"} <= {path.name for path in last.iterdir()}
    done = launch("-m", "fulmen.cli.main", *arguments)
    assert done.returncode == 0, done.stderr[-3000:]

    alone = train(
        train_settings(tied_dir, tmp_path / "one", corpus_dir, options={**OPTIONS, "accumulate": 2})
    )
    ours, theirs = log_of(alone), log_of(out)
    assert [row["step"] for row in theirs] == [1, 2, 3, 4]
    for one, two in zip(ours, theirs, strict=True):
        for name in ("loss", "lm", "kl", "indexer", "lr", "tokens"):
            assert two[name] == pytest.approx(one[name], rel=1e-5), name
    results = [json.loads((folder / "conversion.json").read_text()) for folder in (alone, out)]
    one, two = (result["stages_done"]["sparse"] for result in results)
    assert one["best_step"] == two["best_step"] > 0
    assert two["loss_after"] == pytest.approx(one["loss_after"], rel=1e-5)
    expected, got = weights(alone), weights(out)
    assert expected.keys() == got.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-3, atol=2e-5)


def test_what_cannot_be_sharded(tmp_path, corpus_dir, tied_dir, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(ConfigError, match=r"fsdp_version=1 is not supported; launch with --fsdp_version 2"):
        train(train_settings(tied_dir, tmp_path / "out", corpus_dir))
    with pytest.raises(ConfigError, match="launch it without --use_fsdp"):
        convert(settings(tied_dir, tmp_path / "out", corpus_dir))
