"""What the runs of all stages share: their plan, first weights, log, checkpoints and end.

A run is a folder. Interrupted, it goes on from the last complete checkpoint with the same plan, and ends with
the same weights as a run that was not.
"""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import TRAINER_STATE_NAME

from fulmen.errors import OutputError
from fulmen.files import atomic_write
from fulmen.ops.half_products import hasten_half_products
from fulmen.training.checkpoints import (
    drop_unfinished_checkpoints,
    is_complete_checkpoint,
    last_complete_checkpoint,
    log_up_to,
    write_log,
)
from fulmen.training.processes import broadcast_from_main, is_main_process, main_process_first
from fulmen.training.sharding import is_sharded

INITIAL_FILE, PLAN_FILE = "initial.safetensors", "plan.json"
# Evaluations take no more than this share of a time budget.
EVALUATION_SHARE = 0.2

# Called with (step, steps, logs); at first with step 0, in a resumed run with the last one.
OnStep = Callable[[int, int, dict[str, float]], None]
# Called with (done, total, what) between steps: validation, asking the teacher, timing a step.
OnPart = Callable[[int, int, str], None]


def open_run(run_dir: Path) -> str | None:
    """Make the run's folder, delete what was half-written; return the last complete checkpoint, if any."""

    def open_folder() -> str | None:
        run_dir.mkdir(parents=True, exist_ok=True)
        if is_main_process():
            drop_unfinished_checkpoints(run_dir)
        return last_complete_checkpoint(run_dir)

    return main_process_first(open_folder)


def first_weights(run_dir: Path, state: Callable[[], dict[str, Tensor]]) -> Path:
    """The file of the weights that training began with, written at the first start.

    Args:
        state: makes them, by name, contiguous.

    Raises OutputError if the disk is full.
    """
    file = run_dir / INITIAL_FILE

    def write() -> Path:
        if not file.exists():
            atomic_write(file, lambda temporary: save_file(state(), temporary))
        return file

    try:
        return main_process_first(write)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{run_dir} has no room for the first weights ({error})") from error


def run_plan(run_dir: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `make` decides in the main process: written down, so that a resumed run does the same."""
    file = run_dir / PLAN_FILE

    def read() -> dict[str, Any]:
        if not file.exists():
            plan = json.dumps(make())
            atomic_write(file, lambda temporary: temporary.write_text(plan, encoding="utf-8"))
        kept: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return kept

    return main_process_first(read)


def steps_within(
    budget_s: float, evaluation_s: float, step_s: float, most_evaluations: int, made: int
) -> tuple[int, int]:
    """Steps, and evaluations among them, that a time budget (seconds) has room for: one of each at least.

    Args:
        evaluation_s, step_s: what one takes, as timed once.
        made: evaluations before the first step, which have taken their time too.
    """
    affordable = int(EVALUATION_SHARE * budget_s / evaluation_s) - made
    evaluations = min(max(affordable, 1), most_evaluations)
    # A margin, for one step is timed only, and saving takes time too.
    left_s = 0.9 * budget_s - evaluation_s * (evaluations + made) - step_s
    return max(evaluations, int(left_s / step_s)), evaluations


def training_arguments(
    run_dir: Path, steps: int, every: int, seed: int, device: torch.device, *, bf16: bool, **own: Any
) -> TrainingArguments:
    """Trainer's arguments, as all stages have them: a checkpoint at every evaluation, nothing printed.

    Args:
        every: steps between evaluations.
        device: where the model lies; one that is to be sharded goes to GPUs where there are some.
        own: the stage's; they win.
    """
    if bf16:
        hasten_half_products(torch.bfloat16)
    shared: dict[str, Any] = {
        "output_dir": str(run_dir),
        "max_steps": steps,
        "per_device_train_batch_size": 1,
        # Not cosine_with_min_lr, whose first step has a rate of 0.
        "lr_scheduler_type": "cosine_warmup_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
        "seed": seed,
        "bf16": bf16,
        "use_cpu": device.type == "cpu" and not (is_sharded() and torch.cuda.is_available()),
        "eval_strategy": "steps",
        "eval_steps": every,
        "save_strategy": "steps",
        "save_steps": every,
        "save_total_limit": 2,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
        "report_to": [],
        "remove_unused_columns": False,
        "ddp_find_unused_parameters": False,
    }
    arguments = TrainingArguments(**{**shared, **own})
    # One process is one GPU: Trainer would split its batch, a single sequence, over all that there are.
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    return arguments


def silence(trainer: Trainer) -> None:
    """Trainer writes tables of its own to the console; `on_step` is ours."""
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)


def best_checkpoint(trainer: Trainer, run_dir: Path, loss_before: float) -> tuple[str | None, float]:
    """The checkpoint of least evaluation loss, if below `loss_before`, and the loss of the best weights."""
    state = trainer.state
    if not is_complete_checkpoint(state.best_model_checkpoint) and (
        last := last_complete_checkpoint(run_dir)
    ):
        # The best one was being written when the run was stopped.
        state = TrainerState.load_from_json(str(Path(last, TRAINER_STATE_NAME)))
    best, metric = state.best_model_checkpoint, state.best_metric
    if not is_complete_checkpoint(best) or metric is None or not metric < loss_before:
        return None, loss_before
    return best, metric


class RunWatch(TrainerCallback):
    """Logs and reports a stage's steps, and ends it with its budget. A stage says what a step's log holds.

    Args:
        log_file: lines of JSON, each with its "step".
        budget_s: seconds since `began` (time.monotonic); None: no end.
    """

    loss_name: ClassVar[str]

    def __init__(self, log_file: Path, on_step: OnStep, budget_s: float | None, began: float) -> None:
        self.log_file, self.on_step, self.budget_s, self.began = log_file, on_step, budget_s, began
        self.writes = is_main_process()

    def step_rows(self, step: int) -> Sequence[dict[str, Any]]:
        """Lines of the step that has ended, for the log."""
        raise NotImplementedError

    def step_figures(self) -> dict[str, float]:
        """Figures of the step that has ended, for `on_step`."""
        raise NotImplementedError

    def resume(self, rows: Sequence[dict[str, Any]]) -> None:
        """Take up the log of the steps before the first; none in a new run."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forget the log of steps that are to be done again."""
        rows = log_up_to(self.log_file, state.global_step)
        self.resume(rows)
        if self.writes:
            write_log(self.log_file, rows)
        self.on_step(state.global_step, state.max_steps, {})

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        rows = self.step_rows(state.global_step)
        if self.writes:
            with open(self.log_file, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
        self.on_step(state.global_step, state.max_steps, self.step_figures())
        if self.budget_s is not None and broadcast_from_main(time.monotonic() - self.began > self.budget_s):
            control.should_training_stop = control.should_evaluate = control.should_save = True

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        self.on_step(state.global_step, state.max_steps, self.evaluation_figures(metrics))

    def evaluation_figures(self, metrics: dict[str, float]) -> dict[str, float]:
        """What an evaluation found, for `on_step`."""
        return {self.loss_name: metrics["eval_loss"]}
