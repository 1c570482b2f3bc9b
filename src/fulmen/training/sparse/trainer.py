"""Transformers' Trainer for the sparse stage: what it optimizes, watches, writes down and keeps."""

import json
import math
import os
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from fulmen.errors import TrainingDivergedError
from fulmen.files import atomic_write
from fulmen.training.checkpoints import SafeCheckpoints
from fulmen.training.run import OnPart, OnStep, RunWatch, training_arguments
from fulmen.training.sharding import Sharded, load_full_weights
from fulmen.training.sparse.settings import SparseSettings
from fulmen.training.sparse.stage import SparseStage, StepLosses
from fulmen.training.sparse.streamed import StreamedRows
from fulmen.training.sparse.teacher import TARGET_KEYS, DistilledRows

WEIGHTS_FILE, LOG_FILE, POSITION_FILE = "model.safetensors", "sparse.jsonl", "position.json"
TENSORBOARD_DIR = "tensorboard"
# A step's KL this many times the median of the last ones and this many nats above it, or an LM loss so many
# nats above, is a spike: sequences differ by a factor of 3 in the KL, and by 2 nats in how hard they are.
SPIKE_FACTOR, SPIKE_KL, SPIKE_LM = 8.0, 1.0, 4.0
SPIKE_HISTORY, LEAST_HISTORY = 20, 5
PARTS = ("loss", "lm", "kl", "indexer")


class SparseTrainer(SafeCheckpoints, Sharded, Trainer):
    """Two parameter groups that never meet, the held-out sparse loss, the trained weights as checkpoint.

    With them lies the position in a stream of sequences.
    """

    train_dataset: DistilledRows
    validation: list[dict[str, Tensor]]
    settings: SparseSettings
    on_part: OnPart

    @property
    def stage(self) -> SparseStage:
        """The module that is trained, whatever Accelerate wrapped it in."""
        return self.accelerator.unwrap_model(self.model)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW with a learning rate for the backbone and one for the indexers."""
        stage = self.stage if model is None else model
        groups = [
            {"params": stage.backbone_parameters(), "lr": self.settings.backbone_rate},
            {"params": stage.indexer_parameters(), "lr": self.settings.indexer_learning_rate},
        ]
        self.optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]], betas=(0.9, 0.95), weight_decay=0.0
        )
        return self.optimizer

    def compute_loss(
        self, model: nn.Module, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        # Accelerate puts autocast into the model itself, but not where FSDP2 shards it.
        with self.accelerator.autocast():
            losses = model(**inputs)
        self.watch.took(float(losses["loss"].detach()), self.stage.last)
        return (losses["loss"], {}) if return_outputs else losses["loss"]

    @property
    def watch(self) -> "StepWatch":
        """The callback that collects the steps' losses."""
        return next(one for one in self.callback_handler.callbacks if isinstance(one, StepWatch))

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """Each loss's gradient by itself: a large one of the indexer must not shrink the backbone's."""
        norms = [
            self.accelerator.clip_grad_norm_(parameters, self.args.max_grad_norm)
            for parameters in (self.stage.backbone_parameters(), self.stage.indexer_parameters())
            if parameters
        ]
        return norms[0]

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with self.accelerator.autocast():
            found = held_out_loss(self.model_wrapped, self.validation, self.args.device, self.on_part)
        metrics = {"eval_loss": found.total, "eval_text": found.text, "eval_answers": found.answers}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """A step's losses with their parts, for `report_to`."""
        parts = {name: self.watch.row[name] for name in PARTS[1:]} if "loss" in logs else {}
        super().log({**logs, **parts}, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """All trained weights, gathered, in one file: each process holds the best ones when the run ends."""
        assert output_dir is not None
        state = self.accelerator.get_state_dict(self.model)
        if self.args.should_save:
            os.makedirs(output_dir, exist_ok=True)
            trained = only_trained(self.stage, state)
            file = Path(output_dir, WEIGHTS_FILE)
            atomic_write(file, lambda temporary: save_file(trained, temporary, metadata={"format": "pt"}))
            rows = self.train_dataset.rows
            if isinstance(rows, StreamedRows):
                n_used = self.state.global_step * self.settings.accumulate * self.accelerator.num_processes
                position = json.dumps(rows.state_dict(n_used))
                Path(output_dir, POSITION_FILE).write_text(position, encoding="utf-8")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_trained(self.stage, Path(resume_from_checkpoint, WEIGHTS_FILE))


class HeldOutLoss(NamedTuple):
    """Of held-out rows, in nats a token, each kind's mean; 0 where there is none of it.

    text: next-token loss of ordinary rows, over their second halves. answers: of rows that ask and look up,
    at the answers: KL(teacher || sparse), which wrong answers of the teacher do not blur; without a teacher
    the next-token loss.
    """

    text: float
    answers: float

    @property
    def total(self) -> float:
        """What the best step has least of: loss on ordinary text hardly moves while look-ups break."""
        return self.text + self.answers


@torch.no_grad()
def held_out_loss(
    stage: nn.Module, rows: list[dict[str, Tensor]], device: Any, on_part: OnPart = lambda *_: None
) -> HeldOutLoss:
    """Of the sparse model; rows of one kind weigh the same."""
    was_training = stage.training
    stage.eval()
    losses: dict[bool, list[float]] = {False: [], True: []}
    for number, row in enumerate(rows):
        on_part(number, len(rows), "validation")
        batch = {name: row[name][None].to(device) for name in ("input_ids", "position_ids")}
        answers = bool(row["answers"].any())
        second_half_T = torch.arange(len(row["answers"])) >= len(row["answers"]) // 2
        targets_T = row["answers"] if answers else second_half_T
        given = {key: row[key][None].to(device) for key in TARGET_KEYS if key in row}
        found = stage(**batch, targets=targets_T[None].to(device), **given)
        losses[answers].append(float(found["kl" if given else "lm"]))
    on_part(len(rows), len(rows), "validation")
    stage.train(was_training)
    return HeldOutLoss(*(sum(found) / max(len(found), 1) for found in losses.values()))


def only_trained(stage: SparseStage, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of a gathered state dict, what `trained_state` has."""
    return {name: state[name].contiguous() for name, p in stage.named_parameters() if p.requires_grad}


def load_trained(stage: SparseStage, file: Path) -> None:
    """Put weights that `trained_state` gave back."""
    missing = load_full_weights(stage, load_file(file))
    assert not {name for name, p in stage.named_parameters() if p.requires_grad} & set(missing)


class StepWatch(RunWatch):
    """Collects a step's losses over sequences and processes; checks them before the weights change."""

    loss_name = "held-out loss"

    def __init__(
        self, stage: SparseStage, run_dir: Path, on_step: OnStep, budget_s: float | None, began: float
    ) -> None:
        super().__init__(run_dir / LOG_FILE, on_step, budget_s, began)
        self.stage = stage
        self.taken: list[tuple[float, StepLosses]] = []
        self.row: dict[str, Any] = {}
        self.history: list[dict[str, float]] = []
        self.tokens = 0
        self.reduce: Callable[[Tensor], Tensor] = lambda x: x
        self.processes = 1

    def took(self, loss: float, losses: StepLosses | None) -> None:
        """One sequence's losses."""
        assert losses is not None
        self.taken.append((loss, losses))

    def resume(self, rows: Sequence[dict[str, Any]]) -> None:
        self.history = list(rows[-SPIKE_HISTORY:])
        self.tokens = rows[-1]["tokens"] if rows else 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.taken = []
        self.stage.step = state.global_step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before the weights change: a step that went wrong must not touch them."""
        own = [[loss, one.lm, one.kl, one.indexer] for loss, one in self.taken]
        means = self.reduce(torch.tensor(own, dtype=torch.float64).mean(0)).tolist()
        losses = dict(zip(PARTS, means, strict=True))
        step = state.global_step + 1
        self._check(step, losses, kwargs["optimizer"])
        self.tokens += sum(one.tokens for _, one in self.taken) * self.processes
        rates = [group["lr"] for group in kwargs["optimizer"].param_groups]
        self.row = {"step": step, **losses, "lr": rates[0], "tokens": self.tokens, **self._layer_means()}

    def step_rows(self, step: int) -> list[dict[str, Any]]:
        self.history = [*self.history, self.row][-SPIKE_HISTORY:]
        return [self.row]

    def step_figures(self) -> dict[str, float]:
        return {name: self.row[name] for name in PARTS[1:]}

    def evaluation_figures(self, metrics: dict[str, float]) -> dict[str, float]:
        return {self.loss_name: metrics["eval_text"], "at answers": metrics["eval_answers"]}

    def _layer_means(self) -> dict[str, Any]:
        """Of the first sequence's layers: mean KL and output change; of the measured: recall and k."""
        layers = self.taken[0][1].layers
        if not layers:
            return {}
        captured = {str(i): layer.captured for i, layer in layers.items() if layer.captured is not None}
        return {
            "indexer_kl": statistics.fmean(layer.kl for layer in layers.values()),
            "changed": statistics.fmean(layer.changed for layer in layers.values()),
            "captured": captured,
            "topk": {i: self.stage.taps.topk_of(int(i)) for i in captured},
        }

    def _check(self, step: int, losses: dict[str, float], optimizer: Any) -> None:
        rate = optimizer.param_groups[0]["lr"]
        if not math.isfinite(losses["loss"]):
            layers = self.taken[0][1].layers
            bad = [i for i, layer in layers.items() if not math.isfinite(float(layer.loss.detach()))]
            which = ", ".join(name for name in PARTS if not math.isfinite(losses[name]))
            where = f" and the indexers of layers {bad}" if bad else ""
            raise TrainingDivergedError(
                f"{which} is not finite at step {step}{where}; the last good checkpoint is kept: "
                f"lower the learning rate (now {rate:.2g}) or check the data"
            )
        if len(self.history) < LEAST_HISTORY:
            return
        for name, rise in (("kl", SPIKE_KL), ("lm", SPIKE_LM)):
            usual = statistics.median(row[name] for row in self.history)
            bound = usual + rise if name == "lm" else max(SPIKE_FACTOR * usual, usual + rise)
            if losses[name] > bound:
                raise TrainingDivergedError(
                    f"{name}={losses[name]:.3f} at step {step} is a spike (median of the steps before: "
                    f"{usual:.3f}); the last good checkpoint is kept: lower the learning rate ({rate:.2g})"
                )


def sparse_arguments(
    run_dir: Path, settings: SparseSettings, steps: int, every: int, order: str, device: torch.device
) -> TrainingArguments:
    """Trainer's arguments; checkpoints at every evaluation, and in between where asked for."""
    if settings.report_to == "tensorboard":
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(run_dir / TENSORBOARD_DIR))
    return training_arguments(
        run_dir,
        steps,
        every,
        settings.seed,
        device,
        bf16=settings.bf16,
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=settings.backbone_rate,
        # The first steps of few must not be of the full rate: answers are what they spoil.
        warmup_steps=min(20, steps // 4),
        train_sampling_strategy=order,
        save_steps=min(settings.save_every or every, every),
        restore_callback_states_from_checkpoint=True,
        report_to=[] if settings.report_to == "none" else [settings.report_to],
    )
