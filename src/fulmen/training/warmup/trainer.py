"""Warm-up: train the indexers of a frozen DSA model on Transformers' Trainer.

The trunk runs dense and without gradient; `fulmen.training.warmup.losses` taps each layer. Trainer sees a
module that holds the indexers alone, so its checkpoints are small and `accelerate launch`, mixed precision,
logging and resume work as they do for any model.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from fulmen.errors import TrainingDivergedError, unwritable
from fulmen.files import atomic_write
from fulmen.modeling.selectors import IndexerSelector, dsa_attentions, use_selector
from fulmen.training.checkpoints import (
    SafeCheckpoints,
    checkpoint_step,
    drop_unfinished_checkpoints,
    last_complete_checkpoint,
    log_up_to,
    write_log,
)
from fulmen.training.parts import OnPart
from fulmen.training.precision import are_half, in_float32
from fulmen.training.processes import broadcast_from_main, is_main_process, main_process_first
from fulmen.training.rows import NO_LABEL, TokenIds, next_tokens, sequence_row, sequence_rows
from fulmen.training.warmup.losses import IndexerLossSelector, LayerLoss

# Evaluations after the first; fewer where they would take more than this share of a time budget.
EVALUATIONS, EVALUATION_SHARE = 3, 0.2
MOST_STEPS_BETWEEN = 100
MEASURED_ROWS = 8
LOGITS_ROWS = 512
INITIAL_FILE, LOG_FILE, PLAN_FILE = "initial.safetensors", "layers.jsonl", "plan.json"


@dataclass(frozen=True)
class WarmupSettings:
    """How long and how hard to train.

    steps: optimizer steps; None lets `budget_s` decide.
    budget_s: wall-clock seconds for all of the warm-up, evaluations included.
    learning_rate: peak of a cosine schedule (Adam). n_rows: query rows per text and layer in a step.
    patience: evaluations without improvement before it stops. seed: of the data order and the drawn rows.
    bf16: autocast to bfloat16; 16-bit indexers are trained so anyway, and kept in float32 meanwhile.
    """

    steps: int | None = None
    budget_s: float | None = 480.0
    learning_rate: float = 3e-5
    n_rows: int = 192
    patience: int = 2
    seed: int = 0
    bf16: bool = False


@dataclass(frozen=True)
class WarmupResult:
    """Validation loss (nats a token, sparse) before and at the kept step, and where training stopped."""

    loss_before: float
    loss_after: float
    best_step: int
    last_step: int
    seconds: float


class IndexerStack(nn.Module):
    """What Trainer trains: a model's indexers; the trunk stays out of `parameters` and `state_dict`."""

    def __init__(self, model: PreTrainedModel, n_rows: int) -> None:
        super().__init__()
        attentions = dsa_attentions(model)
        self.indexers = nn.ModuleDict(
            {str(attention.layer_idx): attention.indexer for attention in attentions}
        )
        self.n_rows = n_rows
        self.out_weights = {layer.layer_idx: layer.output_weight().detach() for layer in attentions}
        self.last: dict[int, LayerLoss] = {}
        self._backbone = (model,)  # in a tuple: not a submodule

    @property
    def model(self) -> PreTrainedModel:
        """The whole model, trunk included."""
        return self._backbone[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "IndexerStack":
        self.model._apply(fn)  # moves the indexers too: they are the model's own
        return self

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> dict[str, Tensor]:
        """Mean over layers of `IndexerLossSelector`'s loss, with gradient to the indexers alone."""
        taps = IndexerLossSelector(self.out_weights, self.n_rows, MEASURED_ROWS)
        with use_selector(self.model, taps):
            self.model.base_model(input_ids=input_ids, position_ids=position_ids, use_cache=False)
        self.last = taps.layers
        return {"loss": torch.stack([layer.loss for layer in taps.layers.values()]).mean()}


def warm_up(
    model: PreTrainedModel,
    train: Sequence[TokenIds],
    validation: Sequence[TokenIds],
    run_dir: Path,
    settings: WarmupSettings,
    on_step: Callable[[int, int, dict[str, float]], None] = lambda *_: None,
    on_part: OnPart = lambda *_: None,
) -> WarmupResult:
    """Train the indexers in place; leave the best step's weights in them, the first's if none was better.

    Interrupted, a call with the same arguments resumes from `run_dir` and ends with the same weights.

    Args:
        train, validation: texts, all train texts of one length; no loss crosses the documents packed in one.
        run_dir: checkpoints, `layers.jsonl` (per layer: KL, entropy, captured and oracle mass) and the plan.
        on_step: called with (step, steps, logs) for progress, at first with step 0 (resumed: the last one).
        on_part: called with (done, total, what) for what is not a step.

    Raises:
        TrainingDivergedError: the loss became NaN or infinite; the weights are the best so far.
        OutputError: `run_dir` cannot be written or is full; the same call goes on once that is mended.
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
    on_step: Callable[[int, int, dict[str, float]], None],
    on_part: OnPart,
) -> WarmupResult:
    began = time.monotonic()
    run_dir.mkdir(parents=True, exist_ok=True)
    stack = IndexerStack(model, settings.n_rows)
    model.requires_grad_(False)
    stack.indexers.requires_grad_(True)
    model.eval()
    last_step = main_process_first(lambda: _forget_what_is_not_whole(run_dir))
    last_checkpoint = str(run_dir / f"checkpoint-{last_step}") if last_step else None
    initial = main_process_first(lambda: _initial(stack, run_dir))
    # As the steps and evaluations compute.
    with torch.autocast(model.device.type, torch.bfloat16, enabled=settings.bf16):
        plan = main_process_first(lambda: _plan(stack, train, validation, run_dir, settings, on_part))
    trainer = _WarmupTrainer(
        model=stack,
        args=_arguments(run_dir, settings, plan["steps"], plan["evaluations"]),
        train_dataset=sequence_rows(train),
        eval_dataset=sequence_rows(validation),
        callbacks=[
            EarlyStoppingCallback(settings.patience),
            _Watch(stack, run_dir, on_step, settings.budget_s, began),
        ],
    )
    trainer.on_part = on_part
    # Trainer writes its own tables to the console; on_step is ours.
    _drop_printing_callbacks(trainer)
    try:
        trainer.train(resume_from_checkpoint=last_checkpoint)
    finally:
        best_step = _restore_best(trainer, stack, run_dir, initial, plan["loss_before"])
        model.requires_grad_(True)
    best = trainer.state.best_metric
    after = plan["loss_before"] if best is None or best_step == 0 else best
    return WarmupResult(
        plan["loss_before"], after, best_step, trainer.state.global_step, time.monotonic() - began
    )


@torch.no_grad()
def sparse_loss(model: PreTrainedModel, texts: Sequence[TokenIds]) -> float:
    """Next-token loss (nats) of the sparse model over the second half of each text."""
    return _sparse_loss(model, sequence_rows(texts), lambda *_: None)


def _sparse_loss(model: PreTrainedModel, rows: Sequence[dict[str, Tensor]], on_part: OnPart) -> float:
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


class _WarmupTrainer(SafeCheckpoints, Trainer):
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
            metrics = {"eval_loss": _sparse_loss(self.stack.model, rows, self.on_part)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class _Watch(TrainerCallback):
    """Per-layer log, progress, and the end of the budget."""

    def __init__(
        self, stack: IndexerStack, run_dir: Path, on_step: Callable, budget_s: float | None, began: float
    ) -> None:
        self.stack, self.on_step, self.budget_s, self.began = stack, on_step, budget_s, began
        self.log_file = run_dir / LOG_FILE

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.on_step(state.global_step, state.max_steps, {})

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        layers = self.stack.last
        rows = [_log_row(state.global_step, index, layer) for index, layer in sorted(layers.items())]
        if is_main_process():
            with open(self.log_file, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
        means = {
            name: sum(getattr(layer, name) for layer in layers.values()) / len(layers)
            for name in ("kl", "changed")
        }
        self.on_step(state.global_step, state.max_steps, means)
        if self.budget_s is not None and broadcast_from_main(time.monotonic() - self.began > self.budget_s):
            control.should_training_stop = control.should_evaluate = control.should_save = True

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        self.on_step(state.global_step, state.max_steps, {"validation loss": metrics["eval_loss"]})


def _log_row(step: int, index: int, layer: LayerLoss) -> dict[str, float]:
    values = {name: getattr(layer, name) for name in ("kl", "changed", "entropy", "captured", "oracle")}
    return {"step": step, "layer": index, **values}


def _initial(stack: IndexerStack, run_dir: Path) -> dict[str, Tensor]:
    """The weights that training began with, written down at the first start."""
    file = run_dir / INITIAL_FILE
    if not file.exists():
        state = {name: tensor.contiguous() for name, tensor in stack.indexers.state_dict().items()}
        atomic_write(file, lambda temporary: save_file(state, temporary))
    return load_file(file)


def _plan(
    stack: IndexerStack,
    train: Sequence[TokenIds],
    validation: Sequence[TokenIds],
    run_dir: Path,
    settings: Any,
    on_part: OnPart,
) -> dict[str, Any]:
    """Number of steps and the loss before; written down, so that a resumed run follows the same schedule."""
    file = run_dir / PLAN_FILE
    if file.exists():
        return json.loads(file.read_text(encoding="utf-8"))
    clock = time.monotonic()
    with torch.no_grad():
        before = _sparse_loss(stack.model, sequence_rows(validation), on_part)
    evaluation_s = time.monotonic() - clock
    steps, evaluations = settings.steps, EVALUATIONS
    if steps is None:
        affordable = int(EVALUATION_SHARE * settings.budget_s / evaluation_s) - 1
        evaluations = min(max(affordable, 1), EVALUATIONS)
        on_part(0, 1, "timing a step")
        clock = time.monotonic()
        stack.train()
        row = {name: part[None].to(stack.model.device) for name, part in sequence_row(train[0]).items()}
        stack(**row)["loss"].backward()
        stack.zero_grad(set_to_none=True)
        step_s = time.monotonic() - clock
        # A margin, for the first step is timed once only, and saving takes time too.
        left_s = 0.9 * settings.budget_s - evaluation_s * (evaluations + 1) - step_s
        steps = max(evaluations, int(left_s / step_s))
    plan = {"steps": steps, "evaluations": evaluations, "loss_before": before}
    atomic_write(file, lambda temporary: temporary.write_text(json.dumps(plan), encoding="utf-8"))
    return plan


def _arguments(run_dir: Path, settings: WarmupSettings, steps: int, evaluations: int) -> TrainingArguments:
    every = max(1, min(math.ceil(steps / evaluations), MOST_STEPS_BETWEEN))
    return TrainingArguments(
        output_dir=str(run_dir),
        max_steps=steps,
        per_device_train_batch_size=1,
        learning_rate=settings.learning_rate,
        # Not cosine_with_min_lr, whose first step has a rate of 0.
        lr_scheduler_type="cosine_warmup_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        warmup_steps=min(5, steps // 4),
        adam_beta2=0.95,
        weight_decay=0.0,
        seed=settings.seed,
        bf16=settings.bf16,
        use_cpu=not torch.cuda.is_available(),
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to=[],
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
    )


def _drop_printing_callbacks(trainer: Trainer) -> None:
    from transformers import PrinterCallback, ProgressCallback

    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)


def _restore_best(
    trainer: Trainer, stack: IndexerStack, run_dir: Path, initial: dict[str, Tensor], loss_before: float
) -> int:
    """Load the best weights seen; return their step, 0 for the weights that training began with."""
    best, metric = trainer.state.best_model_checkpoint, trainer.state.best_metric
    whole = best is not None and Path(best, "model.safetensors").exists()
    if best is None or not whole or metric is None or metric >= loss_before:
        stack.indexers.load_state_dict(initial)
        return 0
    stack.load_state_dict(load_file(Path(best) / "model.safetensors"))
    return checkpoint_step(best)


def _forget_what_is_not_whole(run_dir: Path) -> int:
    """Remove what an interruption cut short or went beyond; return the last checkpoint's step, 0 for none."""
    drop_unfinished_checkpoints(run_dir)
    last = last_complete_checkpoint(run_dir)
    last_step = checkpoint_step(last) if last else 0
    log = run_dir / LOG_FILE
    if log.exists():
        write_log(log, log_up_to(log, last_step))
    return last_step
