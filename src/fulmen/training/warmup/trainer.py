"""Transformers' Trainer for the warm-up: what it evaluates, watches and writes down."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

from fulmen.errors import TrainingDivergedError
from fulmen.modeling.selectors import IndexerSelector, use_selector
from fulmen.training.checkpoints import SafeCheckpoints
from fulmen.training.rows import NO_LABEL, TokenIds, next_tokens, sequence_rows
from fulmen.training.run import OnPart, OnStep, RunWatch, training_arguments
from fulmen.training.warmup.losses import LayerLoss
from fulmen.training.warmup.settings import WarmupSettings
from fulmen.training.warmup.stage import IndexerStack

MOST_STEPS_BETWEEN = 100
LOGITS_ROWS = 512
LOG_FILE = "layers.jsonl"


@torch.no_grad()
def sparse_loss(model: PreTrainedModel, sequences: Sequence[TokenIds]) -> float:
    """Next-token loss (nats) of the sparse model over the second half of each sequence."""
    return validation_loss(model, sequence_rows(sequences), lambda *_: None)


def validation_loss(model: PreTrainedModel, rows: Sequence[dict[str, Tensor]], on_part: OnPart) -> float:
    """`sparse_loss` of rows for Trainer; all tokens weigh the same."""
    total, count = 0.0, 0
    with use_selector(model, IndexerSelector()):
        for number, row in enumerate(rows):
            on_part(number, len(rows), "validation")
            batch = {name: part[None].to(model.device) for name, part in row.items()}
            half = batch["input_ids"].shape[1] // 2
            next_T = next_tokens(batch["input_ids"], batch["position_ids"])[0, half:]
            hidden_TC = model.base_model(**batch, use_cache=False)[0][0, half:][next_T != NO_LABEL]
            next_T = next_T[next_T != NO_LABEL]
            for rows_TC, some_T in zip(hidden_TC.split(LOGITS_ROWS), next_T.split(LOGITS_ROWS), strict=True):
                logits_TV = model.get_output_embeddings()(rows_TC).float()
                total += float(F.cross_entropy(logits_TV, some_T, reduction="sum"))
                count += len(some_T)
    on_part(len(rows), len(rows), "validation")
    return total / count


class WarmupTrainer(SafeCheckpoints, Trainer):
    """Evaluates what matters, the sparse model's loss on validation text, in place of the training loss."""

    on_part: OnPart

    @property
    def stack(self) -> IndexerStack:
        """The module that is trained, whatever Accelerate wrapped it in."""
        return self.accelerator.unwrap_model(self.model)

    def compute_loss(
        self, model: nn.Module, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss = model(**inputs)["loss"]
        if not torch.isfinite(loss):
            bad = [i for i, layer in self.stack.last.items() if not math.isfinite(float(layer.loss.detach()))]
            raise TrainingDivergedError(
                f"loss={float(loss.detach())} at step {self.state.global_step} in layers {bad}; "
                f"lower the learning rate (now {self.args.learning_rate}) or check the data"
            )
        return (loss, {}) if return_outputs else loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        rows: Any = self.eval_dataset
        with torch.no_grad(), self.accelerator.autocast():
            metrics = {"eval_loss": validation_loss(self.stack.model, rows, self.on_part)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class WarmupWatch(RunWatch):
    """Logs every layer's losses."""

    loss_name = "validation loss"

    def __init__(
        self, stack: IndexerStack, run_dir: Path, on_step: OnStep, budget_s: float | None, began: float
    ) -> None:
        super().__init__(run_dir / LOG_FILE, on_step, budget_s, began)
        self.stack = stack

    def step_rows(self, step: int) -> list[dict[str, Any]]:
        return [_log_row(step, index, layer) for index, layer in sorted(self.stack.last.items())]

    def step_figures(self) -> dict[str, float]:
        layers = self.stack.last.values()
        return {
            name: sum(getattr(layer, name) for layer in layers) / len(layers) for name in ("kl", "changed")
        }


def _log_row(step: int, index: int, layer: LayerLoss) -> dict[str, float]:
    values = {name: getattr(layer, name) for name in ("kl", "changed", "entropy", "captured", "oracle")}
    return {"step": step, "layer": index, **values}


def warmup_arguments(
    run_dir: Path, settings: WarmupSettings, steps: int, evaluations: int, device: torch.device
) -> TrainingArguments:
    """Trainer's arguments; a checkpoint at every evaluation."""
    return training_arguments(
        run_dir,
        steps,
        max(1, min(math.ceil(steps / evaluations), MOST_STEPS_BETWEEN)),
        settings.seed,
        device,
        bf16=settings.bf16,
        learning_rate=settings.learning_rate,
        warmup_steps=min(5, steps // 4),
        adam_beta2=0.95,
        weight_decay=0.0,
        load_best_model_at_end=True,
    )
