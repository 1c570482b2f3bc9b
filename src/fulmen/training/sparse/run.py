"""One run of the sparse stage, from a model with indexers to the same model with its best weights."""

import copy
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    ProgressCallback,
    TrainerState,
)
from transformers.trainer import TRAINER_STATE_NAME

from fulmen.data import SequenceStream
from fulmen.errors import ConfigError, OutputError
from fulmen.files import atomic_write
from fulmen.modeling.families import dsa_of
from fulmen.modeling.selectors import dsa_attentions
from fulmen.training.checkpoints import (
    COMPLETE_FILE,
    checkpoint_step,
    drop_unfinished_checkpoints,
    last_complete_checkpoint,
)
from fulmen.training.parts import OnPart
from fulmen.training.precision import are_half, in_float32
from fulmen.training.processes import processes
from fulmen.training.rows import TokenIds, sequence_row, sequence_rows
from fulmen.training.sharding import is_sharded
from fulmen.training.sparse.lora import add_lora, merge_lora
from fulmen.training.sparse.schedule import TopkSchedule
from fulmen.training.sparse.settings import SparseSettings, SparseStage
from fulmen.training.sparse.streamed import StreamedRows
from fulmen.training.sparse.teacher import TARGET_KEYS, DistilledRows, Row, TargetFiles, Teacher
from fulmen.training.sparse.trainer import (
    POSITION_FILE,
    WEIGHTS_FILE,
    OnStep,
    SparseTrainer,
    StepWatch,
    held_out_loss,
    load_trained,
    training_arguments,
)

INITIAL_FILE, PLAN_FILE, TARGETS_DIR = "initial.safetensors", "plan.json", "teacher"
# Evaluations take no more than this share of a time budget.
EVALUATION_SHARE = 0.2


@dataclass(frozen=True)
class SparseResult:
    """Held-out loss (nats a token): read densely and sparsely before, sparsely at the kept step.

    skipped: rows and files of the data that were left out, by reason; filled in by who reads them.
    """

    dense_before: float
    loss_before: float
    loss_after: float
    best_step: int
    last_step: int
    tokens: int
    seconds: float
    skipped: Mapping[str, int] = field(default_factory=dict)


def train_sparse(
    model: PreTrainedModel,
    train: Sequence[TokenIds] | SequenceStream,
    validation: Sequence[TokenIds],
    run_dir: Path,
    settings: SparseSettings,
    teacher: PreTrainedModel | None = None,
    on_step: OnStep = lambda *_: None,
    on_part: OnPart = lambda *_: None,
) -> SparseResult:
    """Train all weights in place; leave the best step's in them, the first ones if none was better.

    Interrupted, a call with the same arguments resumes from `run_dir` and ends with the same weights; the
    model must have its first weights again, for they are the teacher's too.

    Args:
        train, validation: texts of one length, longer than the model's k. A stream is read in its order, as
            far as the steps need it, and from its beginning again where it ends.
        run_dir: checkpoints, `sparse.jsonl` (a line a step), the plan, and what the teacher answered.
        teacher: whom to learn from; None: the model as it is now, read densely.
        on_step: called with (step, steps, logs), at first with step 0 (resumed: the last one).
        on_part: called with (done, total, what) for what is not a step.

    Raises:
        ConfigError: no text is longer than k, or the teacher's answers about a stream are to be kept.
        CorpusError: a stream cannot be read.
        TrainingDivergedError: a loss spiked or was not finite; the weights are the best so far.
        OutputError: the disk is full; what was written before is whole.
    """
    began = time.monotonic()
    run_dir.mkdir(parents=True, exist_ok=True)
    held_out = sequence_rows(validation)
    length = train.length if isinstance(train, SequenceStream) else len(sequence_row(train[0])["input_ids"])
    topk = dsa_of(model.config).topk
    if topk >= length:
        raise ConfigError(f"topk={topk} is not below the texts' {length} tokens; use longer texts")
    require_teacher_place(settings, is_streamed=isinstance(train, SequenceStream))
    state = processes()
    if state.is_main_process:
        drop_unfinished_checkpoints(run_dir)
    selectors = [attention.selector for attention in dsa_attentions(model)]
    stage = prepare_stage(model, settings)
    settings = replace(settings, bf16=settings.bf16 or are_half(stage.trained_parameters()))
    _keep_first_weights(stage, run_dir, state)
    asked = _teacher(stage, teacher, settings)
    plan = _plan(stage, asked, held_out, run_dir, settings, state, on_part)
    n_uses = plan["steps"] * settings.accumulate * state.num_processes
    checkpoint = last_complete_checkpoint(run_dir)
    rows = _rows(train, n_uses, checkpoint, settings, state)
    stage.schedule = TopkSchedule(
        settings.k_schedule, length, topk, tuple(sorted(stage.attentions)), plan["steps"]
    )
    source = _target_source(asked, teacher is None, rows, n_uses, run_dir, settings, state, on_part)
    with in_float32(stage.trained_parameters()):
        # FSDP2 cannot be undone: it shards a copy, and the model gets the best weights from their file.
        trained = copy.deepcopy(stage) if is_sharded() else stage
        watch = StepWatch(trained, run_dir, on_step, settings.budget_s, began)
        trainer = _trainer(trained, DistilledRows(rows, source), held_out, run_dir, settings, plan, watch)
        trainer.on_part = on_part
        try:
            trainer.train(resume_from_checkpoint=checkpoint)
        finally:
            best_step, after = restore_best(trainer, stage, run_dir, plan["loss_before"])
            for attention, selector in zip(dsa_attentions(model), selectors, strict=True):
                attention.selector = selector
            merge_lora(model)
            model.requires_grad_(True).eval()
    seconds = time.monotonic() - began
    before = (plan["dense_before"], plan["loss_before"])
    return SparseResult(*before, after, best_step, trainer.state.global_step, watch.tokens, seconds)


def require_teacher_place(settings: SparseSettings, *, is_streamed: bool) -> None:
    """Raise ConfigError if the teacher's answers about texts that come once only are to be kept."""
    if is_streamed and settings.teacher_place == "disk":
        raise ConfigError(
            "teacher_place='disk' keeps answers about texts that come again, which streamed ones do not; "
            "use auto or live, or --windows for a number of texts that is held in memory"
        )


def prepare_stage(model: PreTrainedModel, settings: SparseSettings) -> SparseStage:
    """The stage with gradients switched on where they are wanted; with LoRA if asked for."""
    model.requires_grad_(True)
    if settings.lora is not None:
        add_lora(model, settings.lora, settings.seed)
    if settings.k_schedule == "dense":
        for attention in dsa_attentions(model):
            attention.indexer.requires_grad_(False)
    if settings.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return SparseStage(model, settings)


def restore_best(
    trainer: SparseTrainer, stage: SparseStage, run_dir: Path, loss_before: float
) -> tuple[int, float]:
    """Load the best weights seen; return their step (0: the first ones) and held-out loss."""
    state = trainer.state
    if not _is_complete(state.best_model_checkpoint) and (last := last_complete_checkpoint(run_dir)):
        # The best one was being written when the run was stopped.
        state = TrainerState.load_from_json(str(Path(last, TRAINER_STATE_NAME)))
    best, metric = state.best_model_checkpoint, state.best_metric
    if not _is_complete(best) or metric is None or not metric < loss_before:
        load_trained(stage, run_dir / INITIAL_FILE)
        return 0, loss_before
    load_trained(stage, Path(best, WEIGHTS_FILE))
    return checkpoint_step(best), metric


def _is_complete(checkpoint: str | None) -> bool:
    return checkpoint is not None and Path(checkpoint, COMPLETE_FILE).exists()


def _keep_first_weights(stage: SparseStage, run_dir: Path, state: PartialState) -> None:
    file = run_dir / INITIAL_FILE
    if state.is_main_process and not file.exists():
        try:
            atomic_write(file, lambda temporary: save_file(stage.trained_state(), temporary))
        except (OSError, SafetensorError) as error:
            raise OutputError(f"{run_dir} has no room for the first weights ({error})") from error
    state.wait_for_everyone()
    # LoRA's are drawn at random, by each process.
    load_trained(stage, file)


def _rows(
    texts: Sequence[TokenIds] | SequenceStream,
    n_uses: int,
    checkpoint: str | None,
    settings: SparseSettings,
    state: PartialState,
) -> Sequence[Row] | StreamedRows:
    """What is trained on; a stream goes on where the checkpoint left it."""
    if not isinstance(texts, SequenceStream):
        return sequence_rows(texts)
    # Trainer draws a step's texts at once, Accelerate's loader one more in each process.
    rows = StreamedRows(texts, n_uses, ahead=(settings.accumulate + 2) * state.num_processes)
    if checkpoint is not None:
        rows.load_state_dict(json.loads(Path(checkpoint, POSITION_FILE).read_text(encoding="utf-8")))
    return rows


def _teacher(stage: SparseStage, given: PreTrainedModel | None, settings: SparseSettings) -> Teacher | None:
    if settings.alpha == 0:
        return None
    return Teacher(stage.model if given is None else given, settings.top_n)


def _target_source(
    asked: Teacher | None,
    is_own: bool,
    rows: Sequence[Row] | StreamedRows,
    n_uses: int,
    run_dir: Path,
    settings: SparseSettings,
    state: PartialState,
    on_part: OnPart,
) -> Teacher | TargetFiles | None:
    """Where the rows' targets come from; files are filled before the first step, each process its share."""
    if asked is None:
        return None
    is_live = settings.teacher_place == "live" or (settings.teacher_place == "auto" and n_uses <= len(rows))
    if isinstance(rows, StreamedRows) or is_live:
        # The model is about to change; its copy stays as it is.
        asked.model = copy.deepcopy(asked.model).requires_grad_(False) if is_own else asked.model
        return asked
    files = TargetFiles(run_dir / TARGETS_DIR, asked)
    files.fill(rows[state.process_index :: state.num_processes], on_part)
    state.wait_for_everyone()
    return files


def _trainer(
    stage: SparseStage,
    data: DistilledRows,
    held_out: list[Row],
    run_dir: Path,
    settings: SparseSettings,
    plan: dict[str, Any],
    watch: StepWatch,
) -> SparseTrainer:
    order = "sequential" if isinstance(data.rows, StreamedRows) else "random"
    arguments = training_arguments(run_dir, settings, plan["steps"], plan["every"], order)
    trainer = SparseTrainer(
        model=stage, args=arguments, train_dataset=data, eval_dataset=data, callbacks=[watch]
    )
    trainer.validation, trainer.settings = held_out, settings
    accelerator = trainer.accelerator
    watch.processes, watch.writes = accelerator.num_processes, accelerator.is_main_process
    watch.reduce = lambda means: accelerator.reduce(means.to(accelerator.device), "mean").cpu()
    # Trainer writes its own tables to the console; on_step is ours.
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer


def _plan(
    stage: SparseStage,
    asked: Teacher | None,
    held_out: list[Row],
    run_dir: Path,
    settings: SparseSettings,
    state: PartialState,
    on_part: OnPart,
) -> dict[str, Any]:
    """Number of steps, and the losses before; written down, so that a resumed run does the same."""
    file = run_dir / PLAN_FILE
    if state.is_main_process and not file.exists():
        # As the steps and evaluations compute.
        autocast = torch.autocast(stage.model.device.type, torch.bfloat16, enabled=settings.bf16)
        with in_float32(stage.trained_parameters()), autocast:
            plan = _new_plan(stage, asked, held_out, settings, on_part)
        atomic_write(file, lambda temporary: temporary.write_text(json.dumps(plan), encoding="utf-8"))
    state.wait_for_everyone()
    return json.loads(file.read_text(encoding="utf-8"))


def _new_plan(
    stage: SparseStage, asked: Teacher | None, held_out: list[Row], settings: Any, on_part: OnPart
) -> dict[str, Any]:
    clock = time.monotonic()
    before = held_out_loss(stage, held_out, stage.model.device, on_part)
    evaluation_s = time.monotonic() - clock
    dense = _dense_loss(stage, held_out, on_part)
    steps, evaluations = settings.steps, settings.evaluations
    if steps is None:
        affordable = int(EVALUATION_SHARE * settings.budget_s / evaluation_s) - 2
        evaluations = min(max(affordable, 1), evaluations)
        on_part(0, 1, "timing a step")
        step_s = settings.accumulate * _time_of_text(stage, asked, held_out[0])
        # A margin, for one text is timed only, and saving takes time too.
        left_s = 0.9 * settings.budget_s - evaluation_s * (evaluations + 2) - step_s
        steps = max(evaluations, int(left_s / step_s))
    every = max(1, math.ceil(steps / evaluations))
    return {"steps": steps, "every": every, "loss_before": before, "dense_before": dense}


def _time_of_text(stage: SparseStage, asked: Teacher | None, row: Row) -> float:
    """Seconds of one forward and backward pass, the teacher's included."""
    clock = time.monotonic()
    batch = {name: part[None].to(stage.model.device) for name, part in row.items()}
    if asked is not None:
        targets = asked.targets(row)
        batch.update({key: part[None] for key, part in zip(TARGET_KEYS, targets, strict=True)})
    stage.train()
    stage(**batch)["loss"].backward()
    stage.zero_grad(set_to_none=True)
    # A live teacher is a copy of the model, and graphs cannot be copied.
    stage.forget()
    return time.monotonic() - clock


@torch.no_grad()
def _dense_loss(stage: SparseStage, held_out: list[Row], on_part: OnPart) -> float:
    schedule = stage.schedule
    stage.schedule = TopkSchedule("dense", 0, 0, (), 1)
    try:
        return held_out_loss(stage, held_out, stage.model.device, on_part)
    finally:
        stage.schedule = schedule
