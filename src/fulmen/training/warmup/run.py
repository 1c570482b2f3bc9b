"""Warm-up: train the indexers of a frozen DSA model on Transformers' Trainer.

The backbone runs dense and without gradient; `fulmen.training.warmup.losses` taps each layer. Trainer sees a
module that holds the indexers alone, so its checkpoints are small and `accelerate launch`, mixed precision,
logging and resume work as they do for any model.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import EarlyStoppingCallback, PreTrainedModel

from fulmen.errors import unwritable
from fulmen.modeling.selectors import dsa_attentions
from fulmen.training.checkpoints import checkpoint_step
from fulmen.training.precision import are_half, in_float32
from fulmen.training.rows import TokenIds, sequence_rows
from fulmen.training.run import (
    OnPart,
    OnStep,
    best_checkpoint,
    first_weights,
    open_run,
    run_plan,
    silence,
    steps_within,
)
from fulmen.training.warmup.settings import WarmupSettings
from fulmen.training.warmup.stage import IndexerStack
from fulmen.training.warmup.trainer import WarmupTrainer, WarmupWatch, validation_loss, warmup_arguments

# After the first; fewer where they would take too much of a time budget.
EVALUATIONS = 3
WEIGHTS_FILE = "model.safetensors"


@dataclass(frozen=True)
class WarmupResult:
    """Validation loss (nats a token, sparse) before and at the kept step, and where training stopped."""

    loss_before: float
    loss_after: float
    best_step: int
    last_step: int
    seconds: float


def warm_up(
    model: PreTrainedModel,
    train: Sequence[TokenIds],
    validation: Sequence[TokenIds],
    run_dir: Path,
    settings: WarmupSettings,
    on_step: OnStep = lambda *_: None,
    on_part: OnPart = lambda *_: None,
) -> WarmupResult:
    """Train the indexers in place; leave the best step's weights in them, the first's if none was better.

    Interrupted, a call with the same arguments resumes from `run_dir` and ends with the same weights.

    Args:
        train, validation: token ids, those to train on all of one length; where several documents are packed
            in one sequence, no loss crosses from one to the next.
        run_dir: checkpoints, the plan, and `layers.jsonl`: per step and layer KL, entropy, and the attention
            recall of its k keys and of the best k.
        on_step, on_part: told of progress (`fulmen.training.run`).

    Raises:
        TrainingDivergedError: the loss became NaN or infinite; the weights are the best so far.
        OutputError: `run_dir` cannot be written or is full; the same call goes on once that is fixed.
    """
    indexers = [p for attention in dsa_attentions(model) for p in attention.indexer.parameters()]
    settings = replace(settings, bf16=settings.bf16 or are_half(indexers))
    try:
        with in_float32(indexers):
            return _warm_up(model, train, validation, run_dir, settings, on_step, on_part)
    except (OSError, SafetensorError) as error:
        raise unwritable(run_dir, error) from error


def _warm_up(
    model: PreTrainedModel,
    train: Sequence[TokenIds],
    validation: Sequence[TokenIds],
    run_dir: Path,
    settings: WarmupSettings,
    on_step: OnStep,
    on_part: OnPart,
) -> WarmupResult:
    began = time.monotonic()
    checkpoint = open_run(run_dir)
    stack = IndexerStack(model, settings.n_rows)
    model.requires_grad_(False)
    stack.indexers.requires_grad_(True)
    model.eval()
    initial = load_file(first_weights(run_dir, lambda: _indexer_state(stack)))
    rows, held_out = sequence_rows(train), sequence_rows(validation)
    plan = run_plan(run_dir, lambda: _plan(stack, rows[0], held_out, settings, on_part))
    trainer = WarmupTrainer(
        model=stack,
        args=warmup_arguments(run_dir, settings, plan["steps"], plan["evaluations"], model.device),
        train_dataset=rows,
        eval_dataset=held_out,
        callbacks=[
            EarlyStoppingCallback(settings.patience),
            WarmupWatch(stack, run_dir, on_step, settings.budget_s, began),
        ],
    )
    trainer.on_part = on_part
    silence(trainer)
    before = plan["loss_before"]
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        best, after = best_checkpoint(trainer, run_dir, before)
        if best is None:
            stack.indexers.load_state_dict(initial)
        else:
            stack.load_state_dict(load_file(Path(best, WEIGHTS_FILE)))
        model.requires_grad_(True)
    best_step = 0 if best is None else checkpoint_step(best)
    return WarmupResult(before, after, best_step, trainer.state.global_step, time.monotonic() - began)


def _indexer_state(stack: IndexerStack) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in stack.indexers.state_dict().items()}


def _plan(
    stack: IndexerStack,
    row: dict[str, Tensor],
    held_out: Sequence[dict[str, Tensor]],
    settings: Any,
    on_part: OnPart,
) -> dict[str, Any]:
    """Number of steps and evaluations, and the loss before."""
    # As the steps and evaluations compute.
    with torch.autocast(stack.model.device.type, torch.bfloat16, enabled=settings.bf16):
        clock = time.monotonic()
        with torch.no_grad():
            before = validation_loss(stack.model, held_out, on_part)
        evaluation_s = time.monotonic() - clock
        steps, evaluations = settings.steps, EVALUATIONS
        if steps is None:
            on_part(0, 1, "timing a step")
            step_s = _time_of_step(stack, row)
            steps, evaluations = steps_within(settings.budget_s, evaluation_s, step_s, EVALUATIONS, made=1)
    return {"steps": steps, "evaluations": evaluations, "loss_before": before}


def _time_of_step(stack: IndexerStack, row: dict[str, Tensor]) -> float:
    """Seconds of one forward and backward pass."""
    clock = time.monotonic()
    stack.train()
    stack(**{name: part[None].to(stack.model.device) for name, part in row.items()})["loss"].backward()
    stack.zero_grad(set_to_none=True)
    return time.monotonic() - clock
