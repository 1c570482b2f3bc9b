"""Two processes over gloo, as `accelerate launch` has them: the same losses and weights as one process."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.training.forks import run_two_processes
from tests.training.sparse.sparse_setup import fresh_model, log_rows, run


def run_process(out: str, dtype: str) -> None:
    run(Path(out), fresh_model().to(getattr(torch, dtype)), n_rows=1000, steps=4, evaluations=2)


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch without gloo")
def test_two_processes_are_one_with_twice_the_texts(tmp_path):
    # Without a GPU, --multi_gpu means gloo processes; --cpu would ask for MPI.
    run_two_processes(run_process, (str(tmp_path / "two"), "float32"), "--multi_gpu")
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
def test_bf16_weights_sharded_by_fsdp2(tmp_path):
    """Weights travel in bfloat16; what is trained, summed and told is float32."""
    options = ("--use_fsdp", "--fsdp_version", "2")
    run_two_processes(run_process, (str(tmp_path / "two"), "bfloat16"), *options)
    run(tmp_path / "one", fresh_model().bfloat16(), n_rows=1000, steps=4, evaluations=2, accumulate=2)
    for ours, theirs in zip(log_rows(tmp_path / "one"), log_rows(tmp_path / "two"), strict=True):
        for name in ("loss", "lm", "kl"):
            assert theirs[name] == pytest.approx(ours[name], rel=0.05), name
        loss = torch.tensor(theirs["loss"])
        assert loss != loss.bfloat16()
    saved = load_file(tmp_path / "two" / "checkpoint-4" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
