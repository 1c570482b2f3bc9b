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
from transformers import PreTrainedModel

from fulmen.data import SequenceStream
from fulmen.errors import ConfigError
from fulmen.modeling.families import dsa_of
from fulmen.modeling.selectors import dsa_attentions
from fulmen.training.checkpoints import checkpoint_step
from fulmen.training.precision import are_half, in_float32
from fulmen.training.processes import processes
from fulmen.training.rows import TokenIds, sequence_row, target_rows, with_targets
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
from fulmen.training.sharding import is_sharded
from fulmen.training.sparse.lora import add_lora, merge_lora
from fulmen.training.sparse.schedule import TopkSchedule
from fulmen.training.sparse.settings import SparseSettings
from fulmen.training.sparse.stage import SparseStage
from fulmen.training.sparse.streamed import StreamedRows
from fulmen.training.sparse.teacher import TARGET_KEYS, DistilledRows, Row, TargetFiles, Teacher
from fulmen.training.sparse.trainer import (
    POSITION_FILE,
    WEIGHTS_FILE,
    HeldOutLoss,
    SparseTrainer,
    StepWatch,
    held_out_loss,
    load_trained,
    sparse_arguments,
)

TARGETS_DIR = "teacher"


@dataclass(frozen=True)
class SparseResult:
    """Held-out loss (nats a token): read densely and sparsely before, sparsely at the kept step.

    answers_*: KL(teacher || model) at the answers of held-out texts that ask and look up, without a teacher
    the loss there; 0 if none does.

    skipped: rows and files of the data that were left out, by reason; filled in by who reads them.
    """

    dense_before: float
    loss_before: float
    loss_after: float
    best_step: int
    last_step: int
    tokens: int
    seconds: float
    answers_dense: float = 0.0
    answers_before: float = 0.0
    answers_after: float = 0.0
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
        train, validation: token ids of one length, longer than the model's k. A stream is read in its order,
            as far as the steps need it, and from its beginning again where it ends.
        run_dir: checkpoints, `sparse.jsonl` (a line a step), the plan, and what the teacher answered.
        teacher: whom to learn from; None: the model as it is now, read densely.
        on_step, on_part: told of progress (`fulmen.training.run`).

    Raises:
        ConfigError: no sequence is longer than k, or the teacher's answers about a stream are to be kept.
        CorpusError: a stream cannot be read.
        TrainingDivergedError: a loss spiked or was not finite; the weights are the best so far.
        OutputError: the disk is full; what was written before is complete.
    """
    began = time.monotonic()
    length = train.length if isinstance(train, SequenceStream) else len(sequence_row(train[0])["input_ids"])
    topk = dsa_of(model.config).topk
    if topk >= length:
        raise ConfigError(f"topk={topk} is not below the sequences' {length} tokens; use longer ones")
    require_teacher_place(settings, is_streamed=isinstance(train, SequenceStream))
    checkpoint, state = open_run(run_dir), processes()
    selectors = [attention.selector for attention in dsa_attentions(model)]
    stage = prepare_stage(model, settings)
    settings = replace(settings, bf16=settings.bf16 or are_half(stage.trained_parameters()))
    initial = first_weights(run_dir, stage.trained_state)
    # LoRA's are drawn at random, by each process.
    load_trained(stage, initial)
    asked = _teacher(stage, teacher, settings)
    held_out = _held_out_rows(validation, asked)
    plan = run_plan(run_dir, lambda: _plan(stage, asked, held_out, settings, on_part))
    n_uses = plan["steps"] * settings.accumulate * state.num_processes
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
            before = HeldOutLoss(*plan["before"])
            best, total = best_checkpoint(trainer, run_dir, before.total)
            load_trained(stage, initial if best is None else Path(best, WEIGHTS_FILE))
            for attention, selector in zip(dsa_attentions(model), selectors, strict=True):
                attention.selector = selector
            merge_lora(model)
            model.requires_grad_(True).eval()
    best_step = 0 if best is None else checkpoint_step(best)
    seconds = time.monotonic() - began
    dense, after = HeldOutLoss(*plan["dense"]), before
    if best is not None:
        after = next(_held_out(row) for row in trainer.state.log_history if row.get("eval_loss") == total)
    return SparseResult(
        dense.text,
        before.text,
        after.text,
        best_step,
        trainer.state.global_step,
        watch.tokens,
        seconds,
        dense.answers,
        before.answers,
        after.answers,
    )


def require_teacher_place(settings: SparseSettings, *, is_streamed: bool) -> None:
    """Raise ConfigError if the teacher's answers about sequences that come once only are to be kept."""
    if is_streamed and settings.teacher_place == "disk":
        raise ConfigError(
            "teacher_place='disk' keeps answers about sequences that come again, which streamed ones do not; "
            "use auto or live, or hold some in memory, as by sequences=256"
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


def _held_out_rows(validation: Sequence[TokenIds], asked: Teacher | None) -> list[Row]:
    """Rows to validate with; those with answers have the teacher's targets there."""
    rows = target_rows(validation)
    if asked is None:
        return rows
    return [
        {**row, **dict(zip(TARGET_KEYS, asked.targets({**row, "targets": row["answers"]}), strict=True))}
        if row["answers"].any()
        else row
        for row in rows
    ]


def _held_out(metrics: Mapping[str, float]) -> HeldOutLoss:
    return HeldOutLoss(metrics["eval_text"], metrics["eval_answers"])


def _rows(
    sequences: Sequence[TokenIds] | SequenceStream,
    n_uses: int,
    checkpoint: str | None,
    settings: SparseSettings,
    state: PartialState,
) -> Sequence[Row] | StreamedRows:
    """What is trained on; a stream goes on where the checkpoint left it."""
    if not isinstance(sequences, SequenceStream):
        return target_rows(sequences, settings.n_targets)
    # Trainer draws a step's sequences at once, Accelerate's loader one more in each process.
    ahead = (settings.accumulate + 2) * state.num_processes
    rows = StreamedRows(sequences, n_uses, ahead, settings.n_targets)
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
        if is_own and settings.lora is None:
            # The model is about to change; its copy stays as it is. With LoRA its own weights stay.
            asked.model = copy.deepcopy(asked.model).requires_grad_(False)
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
    steps, every = plan["steps"], plan["every"]
    arguments = sparse_arguments(run_dir, settings, steps, every, order, stage.model.device)
    trainer = SparseTrainer(
        model=stage, args=arguments, train_dataset=data, eval_dataset=data, callbacks=[watch]
    )
    trainer.validation, trainer.settings = held_out, settings
    accelerator = trainer.accelerator
    watch.processes = accelerator.num_processes
    watch.reduce = lambda means: accelerator.reduce(means.to(accelerator.device), "mean").cpu()
    silence(trainer)
    return trainer


def _plan(
    stage: SparseStage,
    asked: Teacher | None,
    held_out: list[Row],
    settings: Any,
    on_part: OnPart,
) -> dict[str, Any]:
    """Number of steps, and the losses before."""
    # As the steps and evaluations compute.
    autocast = torch.autocast(stage.model.device.type, torch.bfloat16, enabled=settings.bf16)
    with in_float32(stage.trained_parameters()), autocast:
        clock = time.monotonic()
        before = held_out_loss(stage, held_out, stage.model.device, on_part)
        evaluation_s = time.monotonic() - clock
        dense = _dense_loss(stage, held_out, on_part)
        steps, evaluations = settings.steps, settings.evaluations
        if steps is None:
            on_part(0, 1, "timing a step")
            step_s = settings.accumulate * _time_of_sequence(stage, asked, held_out[0], settings)
            steps, evaluations = steps_within(settings.budget_s, evaluation_s, step_s, evaluations, made=2)
    every = max(1, math.ceil(steps / evaluations))
    return {"steps": steps, "every": every, "before": before, "dense": dense}


def _time_of_sequence(
    stage: SparseStage, asked: Teacher | None, held_out: Row, settings: SparseSettings
) -> float:
    """Seconds of one forward and backward pass, the teacher's included."""
    clock = time.monotonic()
    row = with_targets(held_out, settings.n_targets)
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
def _dense_loss(stage: SparseStage, held_out: list[Row], on_part: OnPart) -> HeldOutLoss:
    schedule = stage.schedule
    stage.schedule = TopkSchedule("dense", 0, 0, (), 1)
    try:
        return held_out_loss(stage, held_out, stage.model.device, on_part)
    finally:
        stage.schedule = schedule
