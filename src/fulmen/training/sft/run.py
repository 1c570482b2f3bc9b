"""Supervised fine-tuning on replies, under the model's own attention, with Transformers' Trainer."""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel, Trainer

from fulmen.errors import ConfigError, TrainingDivergedError
from fulmen.training.checkpoints import SafeCheckpoints
from fulmen.training.precision import are_half, in_float32
from fulmen.training.processes import processes
from fulmen.training.rl.scoring import let_score
from fulmen.training.run import OnStep, RunWatch, open_run, silence, training_arguments
from fulmen.training.sft.rows import SftRow, batches, collate, labelled_replies
from fulmen.training.sft.settings import SftSettings
from fulmen.training.sparse.lora import add_lora, merge_lora

LOG_FILE = "sft.jsonl"
# Steps at either end of a run over which its loss is averaged, a quarter of them at most.
ENDS = 10


@dataclass(frozen=True)
class SftResult:
    """What a run came to: mean losses of its first and last steps in nats a token, tokens read, seconds."""

    loss_first: float
    loss_last: float
    steps: int
    tokens: int
    seconds: float


def train_sft(
    model: PreTrainedModel,
    rows: Sequence[SftRow],
    pad: int,
    run_dir: Path,
    settings: SftSettings,
    on_step: OnStep = lambda *_: None,
) -> SftResult:
    """Train `model` in place on the replies of `rows`; the last step's weights are left in it.

    Its indexers stay as they are. Interrupted, a call with the same arguments resumes from `run_dir` and ends
    with the same weights; the model must have its first weights again.

    Args:
        pad: id for padding, which no layer sees.
        run_dir: checkpoints, and `sft.jsonl`, a line a step.
        on_step: told of progress.

    Raises:
        ConfigError: no rows, or a row longer than the model's context.
        TrainingDivergedError: a loss was not finite.
        OutputError: the disk is full; what was written before is complete.
    """
    began = time.monotonic()
    _require_fitting(model, rows)
    settings = replace(settings, bf16=settings.bf16 or are_half(model.parameters()))
    checkpoint, each = open_run(run_dir), settings.batch * processes().num_processes
    drawn = batches(rows, each, settings.steps, settings.seed)
    _switch_gradients(model, settings)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with in_float32(trained):
        watch = SftWatch(run_dir / LOG_FILE, on_step, None, began)
        arguments = training_arguments(
            run_dir,
            settings.steps,
            settings.save_every,
            settings.seed,
            model.device,
            bf16=settings.bf16,
            eval_strategy="no",
            metric_for_best_model=None,
            greater_is_better=None,
            learning_rate=settings.rate,
            warmup_steps=max(1, settings.steps // 20),
            train_sampling_strategy="sequential",
            per_device_train_batch_size=each // processes().num_processes,
        )
        data: list[SftRow] = [row for batch in drawn for row in batch]
        trainer = SftTrainer(
            model,
            arguments,
            train_dataset=data,  # type: ignore[arg-type]
            data_collator=partial(collate, pad=pad),
            callbacks=[watch],
        )
        trainer.watch = watch
        silence(trainer)
        let_score(model, temperature=1.0)
        try:
            trainer.train(resume_from_checkpoint=checkpoint)
        finally:
            for name in ("forward", "_original_forward"):
                vars(model).pop(name, None)
            merge_lora(model)
            model.requires_grad_(True).eval()
    return _result(run_dir / LOG_FILE, sum(map(len, data)), time.monotonic() - began)


class SftTrainer(SafeCheckpoints, Trainer):
    """Takes the loss where replies are, and nowhere else; keeps that of each step."""

    watch: "SftWatch"

    def compute_loss(
        self, model: nn.Module, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        replies = labelled_replies(inputs["input_ids"], inputs["labels"])
        logp_BT = model(scored=replies).logp_BT
        # Of all processes, whose gradients are averaged.
        count = replies.counts_BT.sum() * self.accelerator.num_processes
        if num_items_in_batch is not None:
            count = num_items_in_batch
        loss = -logp_BT.sum() * self.accelerator.num_processes / count
        self.watch.loss = float(loss.detach())
        if not math.isfinite(self.watch.loss):
            step = self.state.global_step + 1
            raise TrainingDivergedError(
                f"the loss of step {step} is {self.watch.loss}; use a lower learning_rate"
            )
        return (loss, {}) if return_outputs else loss


class SftWatch(RunWatch):
    """Writes a step's loss."""

    loss_name = "loss"
    loss = math.nan

    def step_rows(self, step: int) -> list[dict[str, Any]]:
        return [{"step": step, "loss": self.loss}]

    def step_figures(self) -> dict[str, float]:
        return {self.loss_name: self.loss}


def _require_fitting(model: PreTrainedModel, rows: Sequence[SftRow]) -> None:
    if not rows:
        raise ConfigError("there is no reply to learn; give some")
    lengths = list(map(len, rows))
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and (longest := max(lengths)) > context:
        raise ConfigError(
            f"chat {lengths.index(longest) + 1} has {longest} tokens with its reply, and the model's context "
            f"{context}; shorten it, or leave it out"
        )


def _switch_gradients(model: PreTrainedModel, settings: SftSettings) -> None:
    model.requires_grad_(True)
    if settings.lora is not None:
        add_lora(model, settings.lora, settings.seed)
    for name, parameter in model.named_parameters():
        if ".indexer." in name:
            parameter.requires_grad_(False)


def _result(log_file: Path, tokens: int, seconds: float) -> SftResult:
    losses = [json.loads(line)["loss"] for line in log_file.read_text(encoding="utf-8").splitlines()]
    ends = min(ENDS, max(1, len(losses) // 4))
    first, last = losses[:ends], losses[-ends:]
    return SftResult(sum(first) / len(first), sum(last) / len(last), len(losses), tokens, seconds)
