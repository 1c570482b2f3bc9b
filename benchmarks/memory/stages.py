"""Peak memory and time of training steps at any length, each stage in a process of its own.

    python -m benchmarks.memory.stages warmup out/smollm2-135m-dsa --length 32768 --topk 1024
    python -m benchmarks.memory.stages sparse out/smollm2-135m-dsa --length 16384 --topk 1024

A step is all of it: the forward pass, the teacher's where there is one, the backward pass, the optimizer with
its state. The text is one row without document boundaries, which is the most that a row can need. Beyond the
model's context the losses mean nothing; memory and time do.
"""

import json
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import typer
from torch import Tensor
from transformers import PreTrainedModel

from fulmen.data import draw_sequences, load_corpus
from fulmen.modeling.families import set_topk
from fulmen.pipeline.load import load_converted
from fulmen.training.sparse.run import prepare_stage
from fulmen.training.sparse.settings import SparseSettings
from fulmen.training.sparse.teacher import TARGET_KEYS, Teacher
from fulmen.training.warmup.settings import WarmupSettings
from fulmen.training.warmup.stage import IndexerStack

app = typer.Typer(add_completion=False)


def _warmup_steps(model: PreTrainedModel, ids_BT: Tensor) -> Iterator[float]:
    model.requires_grad_(False)
    stack = IndexerStack(model, WarmupSettings().n_rows)
    stack.indexers.requires_grad_(True)
    optimizer = torch.optim.Adam(stack.indexers.parameters(), lr=1e-9)
    while True:
        loss = stack(ids_BT)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield float(loss.detach())


def _sparse_steps(model: PreTrainedModel, ids_BT: Tensor) -> Iterator[float]:
    settings = SparseSettings(checkpointing=True)
    stage = prepare_stage(model, settings)
    row = {"input_ids": ids_BT[0], "position_ids": torch.arange(ids_BT.shape[1])}
    targets = Teacher(model, settings.top_n).targets(row)
    batch = {name: part[None] for name, part in (*row.items(), *zip(TARGET_KEYS, targets, strict=True))}
    optimizer = torch.optim.AdamW(stage.parameters(), lr=1e-9)
    stage.train()
    while True:
        loss = stage(**batch)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield float(loss.detach())


def _measure(
    stage: str,
    steps_of: Callable[[PreTrainedModel, Tensor], Iterator[float]],
    model_dir: Path,
    length: int,
    topk: int,
    steps: int,
) -> None:
    model, tokenizer = load_converted(model_dir)
    set_topk(model, topk)
    text = draw_sequences(load_corpus().training, tokenizer, length, 1)[0]
    run = steps_of(model, text.input_ids[None])
    losses, seconds = [], []
    for _ in range(steps):
        clock = time.perf_counter()
        losses.append(round(next(run), 5))
        seconds.append(round(time.perf_counter() - clock, 1))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    facts = {"stage": stage, "length": length, "topk": topk, "seconds": seconds, "loss": losses}
    print(json.dumps({**facts, "peak_gib": round(peak, 2), "torch": torch.__version__}))


@app.command()
def warmup(model_dir: Path, length: int = 8192, topk: int = 512, steps: int = 2) -> None:
    """Steps of the warm-up: the indexers alone are trained."""
    _measure("warmup", _warmup_steps, model_dir, length, topk, steps)


@app.command()
def sparse(model_dir: Path, length: int = 8192, topk: int = 512, steps: int = 2) -> None:
    """Steps of the sparse stage: all weights, gradient checkpointing, the model's dense self as teacher."""
    _measure("sparse", _sparse_steps, model_dir, length, topk, steps)


if __name__ == "__main__":
    app()
