"""The sparse stage of a conversion, and `fulmen train`, which is that stage alone."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fulmen.data import Corpus, DataSets, SequenceStream, TokenSequence, described, load_corpus, stream_of
from fulmen.errors import CheckpointError, ConfigError
from fulmen.modeling.checkpoint import (
    find_source,
    load_dense,
    load_tokenizer,
    require_free_output,
    require_savable,
    save_converted,
)
from fulmen.modeling.families import accelerated, dsa_family_for, dsa_of, set_topk
from fulmen.pipeline.chat import load_converted_model, load_converted_tokenizer
from fulmen.pipeline.model_card import conversion_card
from fulmen.pipeline.model_config import read_config
from fulmen.pipeline.reporter import TrainingView, say, stage
from fulmen.pipeline.run_dir import RunDir
from fulmen.pipeline.texts import count_of_length, draw_longest, lengths_to_try, split_off, up_to
from fulmen.pipeline.train_settings import TrainSettings
from fulmen.training.processes import main_process_first, processes
from fulmen.training.sharding import prepare_sharding
from fulmen.training.sparse.run import SparseResult, require_teacher_place, train_sparse
from fulmen.training.sparse.settings import SparseSettings
from fulmen.training.sparse.teacher import require_same_tokens
from fulmen.training.sparse.trainer import TENSORBOARD_DIR

SPARSE_DIR, LOG_FILE = "sparse", "sparse.jsonl"
RECORD_FILE, STAGES_DIR = "conversion.json", "stages"
# Where steps are not known beforehand: 256 windows of 2,048 tokens are half a million.
SPARSE_WINDOWS, VALIDATION_WINDOWS = 256, 8
# Numbers of each tensor that a fingerprint reads.
SAMPLED_NUMBERS = 4096


class SparseTexts(NamedTuple):
    """What the stage reads, `length` tokens each. skipped: rows and files that were left out, by reason."""

    length: int
    train: list[TokenSequence] | SequenceStream
    validation: list[TokenSequence]
    skipped: Mapping[str, int]


def sparse_texts(
    texts: Corpus | DataSets,
    tokenizer: Any,
    length: int,
    n_windows: int | None,
    settings: SparseSettings,
) -> SparseTexts:
    """Draw the texts, data sets as a stream unless a number of windows is asked for.

    Raises:
        ConfigError: they fill too few windows.
        CorpusError: there is not even one window, or a data set cannot be read.
    """
    if not isinstance(texts, DataSets):
        train, held_out = _windows(texts, tokenizer, length, n_windows, settings)
        return SparseTexts(length, train, held_out, texts.skipped)
    stream, held_out = _stream(texts, tokenizer, length)
    require_teacher_place(settings, is_streamed=n_windows is None)
    # So few are held, and may come more than once.
    some = stream if n_windows is None else list(islice(stream, n_windows))
    return SparseTexts(length, some, held_out, stream.skipped)


def sparse_stage(
    model: PreTrainedModel,
    texts: SparseTexts,
    settings: SparseSettings,
    run_dir: Path,
    teacher: PreTrainedModel | None = None,
) -> SparseResult:
    """Train `model` in place, with a bar. Raises what `train_sparse` does."""
    with stage("Sparse") as advance:
        view = TrainingView(advance)
        drawn = (texts.train, texts.validation)
        result = train_sparse(model, *drawn, run_dir, settings, teacher, view.step, view.part)
    # A stream leaves out more as it is read.
    skipped = texts.train.skipped if isinstance(texts.train, SequenceStream) else texts.skipped
    result = replace(result, skipped=dict(skipped))
    if processes().is_main_process:
        say(
            f"Sparse stage: held-out loss {result.loss_before:.4f} -> {result.loss_after:.4f}, dense before "
            f"{result.dense_before:.4f} (step {result.best_step} of {result.last_step}, "
            f"{result.tokens} tokens, {result.seconds:.0f} s)"
        )
        if result.skipped:
            say(f"Of the data's rows and files {described(result.skipped)}")
    return result


def _stream(data_sets: DataSets, tokenizer: Any, length: int) -> tuple[SequenceStream, list[TokenSequence]]:
    """What is trained on, and the first windows of a part that neither training nor `fulmen eval` reads."""
    count = count_of_length(VALIDATION_WINDOWS, length)
    held_out = list(islice(SequenceStream(data_sets, tokenizer, length, part="calibration"), count))
    if not held_out:
        raise ConfigError(
            f"the rows kept for validation, one in ten, fill no window of {length} tokens; "
            "add text, or use a smaller --length"
        )
    return SequenceStream(data_sets, tokenizer, length), held_out


def _windows(
    corpus: Corpus, tokenizer: Any, length: int, n_windows: int | None, settings: SparseSettings
) -> tuple[list[TokenSequence], list[TokenSequence]]:
    """What is trained on and what is held out, from texts in memory."""
    if n_windows is None:
        uses = (settings.steps or SPARSE_WINDOWS) * settings.accumulate * processes().num_processes
        n_windows = min(uses, count_of_length(SPARSE_WINDOWS, length)) if settings.steps is None else uses
    n_held_out = count_of_length(VALIDATION_WINDOWS, length)
    drawn = up_to(corpus.training, tokenizer, length, n_windows + n_held_out, settings.seed)
    return split_off(drawn, n_held_out, "sparse")


def train(settings: TrainSettings) -> Path:
    """Run the sparse stage as `fulmen train` does. Raises every FulmenError its parts raise."""
    out = settings.out.expanduser().absolute()
    prepare_sharding()
    require_free_output(out, overwrite=settings.overwrite)
    options = SparseSettings(**settings.options)
    lengths = plan_training(settings)
    with stage("Read data"):
        source = stream_of(*settings.data) or load_corpus(*settings.data)
        tokenizer = load_converted_tokenizer(settings.model_dir)
        if settings.teacher is not None:
            require_same_tokens(tokenizer, load_tokenizer(find_source(settings.teacher)))
        texts = draw_longest(
            lengths, lambda length: sparse_texts(source, tokenizer, length, settings.windows, options)
        )
    say(f"Loading {settings.model_dir}")
    with stage("Load"):
        model = load_converted_model(settings.model_dir)
        main_process_first(lambda: require_savable(model, tokenizer, out))
        teacher = _teacher(settings, model)
    if settings.topk is not None:
        set_topk(model, settings.topk)
    run = RunDir(out)
    state = processes()
    identity = _identity(settings, model, teacher, source, texts.length)
    if state.is_main_process and run.open(identity, discard_other=settings.overwrite):
        say("Resuming an interrupted run")
    state.wait_for_everyone()
    with accelerated(model):
        result = sparse_stage(model, texts, options, run.path / SPARSE_DIR, teacher)
    if state.is_main_process:
        with stage("Save"):
            _save(model, tokenizer, out, settings, result, run)
            run.remove()
        say(f"Wrote {settings.out}; next: fulmen eval {settings.out} --dense SOURCE --html report.html")
    state.wait_for_everyone()
    return out


def plan_training(settings: TrainSettings) -> list[int]:
    """Lengths of text, to be tried in turn. Raises what config and record have against these settings."""
    _, config = read_config(settings.model_dir)
    dsa = dsa_of(config)
    dsa_family_for(config).require_trainable(config)
    _record_of(settings.model_dir)
    if settings.teacher is not None:
        read_config(settings.teacher)
    return lengths_to_try(settings.length, config, settings.topk or dsa.topk)


def _teacher(settings: TrainSettings, model: PreTrainedModel) -> PreTrainedModel | None:
    if settings.teacher is None:
        return None
    return load_dense(settings.teacher, model.dtype)[0].eval().requires_grad_(False)


def _identity(
    settings: TrainSettings,
    model: PreTrainedModel,
    teacher: PreTrainedModel | None,
    source: Corpus | DataSets,
    length: int,
) -> dict[str, Any]:
    """What must be equal for one run to be the continuation of another."""
    asked = {
        key: value for key, value in asdict(settings).items() if key not in ("out", "overwrite", "options")
    }
    return {
        **asked,
        **settings.options,
        "length": length,
        "model_dir": str(settings.model_dir),
        "data": list(settings.data),
        "topk": dsa_of(model.config).topk,
        "processes": processes().num_processes,
        "model_weights": weights_fingerprint(model.state_dict()),
        "teacher_weights": None if teacher is None else weights_fingerprint(teacher.state_dict()),
        "corpus": source.fingerprint,
    }


@torch.no_grad()
def weights_fingerprint(state: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex, 16 digits) of names, shapes and evenly spread numbers of weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        flat = tensor.detach().flatten()
        few = flat[:: max(1, len(flat) // SAMPLED_NUMBERS)].cpu().contiguous()
        digest.update(few.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _save(
    model: PreTrainedModel,
    tokenizer: Any,
    out: Path,
    settings: TrainSettings,
    result: SparseResult,
    run: RunDir,
) -> None:
    record = _record_of(settings.model_dir)
    record["stages"] = [*record["stages"], "sparse"]
    record["stages_done"] = {**record.get("stages_done", {}), "sparse": asdict(result)}
    record["sparse"] = {**settings.options, "length": settings.length, "data": list(settings.data)}
    record["dsa"] = dsa_of(model.config).to_dict()
    run.save_record("conversion", record)
    stage = run.path / SPARSE_DIR
    extras = {RECORD_FILE: run.record("conversion"), f"{STAGES_DIR}/{LOG_FILE}": stage / LOG_FILE}
    for file in (stage / TENSORBOARD_DIR).glob("*"):
        extras[f"{STAGES_DIR}/{TENSORBOARD_DIR}/{file.name}"] = file
    for file in filter(Path.is_file, (settings.model_dir / STAGES_DIR).glob("*")):
        extras.setdefault(f"{STAGES_DIR}/{file.name}", file)
    card = conversion_card(record, model.config.model_type)
    save_converted(model, tokenizer, out, card, overwrite=settings.overwrite, extras=extras)


def _record_of(model_dir: Path) -> dict[str, Any]:
    """How the model was made. Raises CheckpointError if the directory does not say."""
    file = model_dir / RECORD_FILE
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}); name what fulmen convert wrote") from error
