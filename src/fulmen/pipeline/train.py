"""The sparse stage of a conversion, and `fulmen train`: stages on a model that is converted already."""

import json
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from fulmen.data import Corpus, DataSets, SequenceStream, TokenSequence, described
from fulmen.errors import CheckpointError, ConfigError
from fulmen.evaluation.variants import indexer_state, use_topk
from fulmen.modeling.checkpoint import (
    find_source,
    load_dense,
    load_tokenizer,
    require_free_output,
    require_savable,
    save_converted,
)
from fulmen.modeling.families import accelerated, dsa_family_for, dsa_of, set_topk
from fulmen.modeling.lengths import short_text_topk
from fulmen.modeling.text_part import (
    TextShards,
    filled_whole_of,
    processor_files,
    shards_around,
    whole_of,
)
from fulmen.pipeline.coarse_stage import refit_coarse, refit_sequences
from fulmen.pipeline.conversion import Conversion
from fulmen.pipeline.devices import CPU, move, training_device
from fulmen.pipeline.fingerprint import weights_fingerprint
from fulmen.pipeline.load import load_converted_model, load_converted_tokenizer
from fulmen.pipeline.model_card import card_with_images, conversion_card
from fulmen.pipeline.model_config import read_config
from fulmen.pipeline.reporter import Reporter, TrainingView
from fulmen.pipeline.run_dir import RunDir
from fulmen.pipeline.texts import (
    TRAINING_SEQUENCES,
    Asker,
    count_of_length,
    draw_longest,
    lengths_to_try,
    read_corpus,
    read_stream,
    split_off,
    up_to,
)
from fulmen.pipeline.train_settings import TrainSettings
from fulmen.pipeline.warmup import WARMUP_DIR, warmup_stage
from fulmen.training.processes import main_process_first, processes
from fulmen.training.sharding import is_sharded, prepare_sharding
from fulmen.training.sparse.run import SparseResult, require_teacher_place, train_sparse
from fulmen.training.sparse.settings import SparseSettings
from fulmen.training.sparse.teacher import require_same_tokens
from fulmen.training.sparse.trainer import TENSORBOARD_DIR
from fulmen.training.warmup.settings import WarmupSettings

SPARSE_DIR, LOG_FILE = "sparse", "sparse.jsonl"
RECORD_FILE, STAGES_DIR = "conversion.json", "stages"
# Where steps are not known beforehand: 256 sequences of 2,048 tokens are half a million.
SPARSE_SEQUENCES, VALIDATION_SEQUENCES = 256, 8
DEFAULT_LENGTH = 4096


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
    n_sequences: int | None,
    settings: SparseSettings,
    reporter: Reporter,
) -> SparseTexts:
    """Draw the texts, data sets as a stream unless a number of sequences is asked for.

    Every second one asks and looks up: what a sparse model loses first (`Asker`).

    Raises:
        ConfigError: they fill too few sequences.
        CorpusError: there is not even one sequence, or a data set cannot be read.
    """
    asker = Asker(tokenizer, settings.seed, reporter)
    if not isinstance(texts, DataSets):
        parts = _sequences(texts, tokenizer, length, n_sequences, settings)
        train, held_out = (asker.all(part) for part in parts)
        return SparseTexts(length, train, held_out, texts.skipped)
    stream, held_out = _stream(texts, tokenizer, length)
    stream.change, held_out = asker, asker.all(held_out)
    require_teacher_place(settings, is_streamed=n_sequences is None)
    # So few are held, and may come more than once.
    some = stream if n_sequences is None else list(islice(stream, n_sequences))
    return SparseTexts(length, some, held_out, stream.skipped)


def sparse_stage(
    model: PreTrainedModel,
    texts: SparseTexts,
    settings: SparseSettings,
    run_dir: Path,
    reporter: Reporter,
    teacher: PreTrainedModel | None = None,
) -> SparseResult:
    """Train `model` in place, with `short_text_topk`; its coarse level, if any, is fitted anew.

    Raises what `train_sparse` does.
    """
    topk = short_text_topk(dsa_of(model.config).topk, texts.length)
    with reporter.stage("Sparse"), use_topk(model, topk):
        view = TrainingView(reporter)
        drawn = (texts.train, texts.validation)
        result = train_sparse(model, *drawn, run_dir, settings, teacher, view.step, view.part)
    if processes().is_main_process:  # which saves the model
        refit_coarse(model, _first_sequences(texts.train, refit_sequences(texts.length)), reporter)
    # A stream leaves out more as it is read.
    skipped = texts.train.skipped if isinstance(texts.train, SequenceStream) else texts.skipped
    result = replace(result, skipped=dict(skipped))
    reporter.note(
        f"Sparse stage: k = {topk}, held-out loss {result.loss_before:.4f} -> {result.loss_after:.4f}, dense "
        f"before {result.dense_before:.4f}; at answers {result.answers_before:.4f} -> "
        f"{result.answers_after:.4f}, dense before {result.answers_dense:.4f} "
        f"(step {result.best_step} of {result.last_step}, "
        f"{result.tokens} tokens, {result.seconds:.0f} s)"
    )
    if result.skipped:
        reporter.note(f"Of the data's rows and files {described(result.skipped)}")
    return result


def _stream(data_sets: DataSets, tokenizer: Any, length: int) -> tuple[SequenceStream, list[TokenSequence]]:
    """What is trained on, and the first sequences of a part that neither training nor evaluation reads."""
    count = count_of_length(VALIDATION_SEQUENCES, length)
    held_out = list(islice(SequenceStream(data_sets, tokenizer, length, part="calibration"), count))
    if not held_out:
        raise ConfigError(
            f"the rows kept for validation, one in ten, fill no sequence of {length} tokens; "
            "add text, or use a smaller length",
            arguments=["length"],
        )
    return SequenceStream(data_sets, tokenizer, length), held_out


def _sequences(
    corpus: Corpus, tokenizer: Any, length: int, n_sequences: int | None, settings: SparseSettings
) -> tuple[list[TokenSequence], list[TokenSequence]]:
    """What is trained on and what is held out, from texts in memory."""
    if n_sequences is None:
        uses = (settings.steps or SPARSE_SEQUENCES) * settings.accumulate * processes().num_processes
        n_sequences = min(uses, count_of_length(SPARSE_SEQUENCES, length)) if settings.steps is None else uses
    n_held_out = count_of_length(VALIDATION_SEQUENCES, length)
    drawn = up_to(corpus.training, tokenizer, length, n_sequences + n_held_out, settings.seed)
    return split_off(drawn, n_held_out, "sparse")


def run_training(settings: TrainSettings, reporter: Reporter) -> Conversion:
    """Run the sparse stage on a converted model. Raises every FulmenError its parts raise."""
    out = settings.out.expanduser().absolute()
    options = SparseSettings(**settings.options)
    prepare_sharding()
    # Shards go to the GPUs by themselves: the whole need not fit there.
    device = CPU if is_sharded() else training_device(settings.device)
    require_free_output(out, overwrite=settings.overwrite)
    with reporter.stage("Read data"):
        lengths = plan_training(settings)
        tokenizer = load_converted_tokenizer(settings.model_dir)
        if settings.teacher is not None:
            require_same_tokens(tokenizer, load_tokenizer(find_source(settings.teacher)))
        source = read_stream(settings.data, settings.texts) or read_corpus(settings.data, settings.texts)
        texts = draw_longest(
            lengths,
            lambda length: sparse_texts(source, tokenizer, length, settings.sequences, options, reporter),
            reporter,
        )
    reporter.note(f"Loading {settings.model_dir}")
    with reporter.stage("Load"):
        model = load_converted_model(settings.model_dir, device)
        around = shards_around(str(settings.model_dir))
        main_process_first(lambda: require_savable_whole(model, around, tokenizer, out))
        teacher = _teacher(settings, model)
    if settings.topk is not None:
        set_topk(model, settings.topk)
    run, state = RunDir(out), processes()
    identity = _identity(settings, model, teacher, source, texts.length)
    if state.is_main_process and run.open(identity, discard_other=settings.overwrite):
        reporter.note("Resuming an interrupted run")
    state.wait_for_everyone()
    found: dict[str, Any] = {}
    with accelerated(model):
        if "warmup" in settings.stages:
            warmup = _warmup_settings(settings, options)
            some = _first_sequences(texts.train, TRAINING_SEQUENCES)
            found["warmup"] = warmup_stage(model, some, texts.validation, warmup, run, reporter)
        if "sparse" in settings.stages:
            result = sparse_stage(model, texts, options, run.path / SPARSE_DIR, reporter, teacher)
            found["sparse"] = asdict(result)
    record = _record(settings, model, texts.length, found)
    if state.is_main_process:
        with reporter.stage("Save"):
            _save(model, around, tokenizer, settings, record, run)
            run.remove()
    state.wait_for_everyone()
    return Conversion(out, record)


def _warmup_settings(settings: TrainSettings, options: SparseSettings) -> WarmupSettings:
    """Steps and budget are the last stage's."""
    if "sparse" in settings.stages:
        return WarmupSettings(seed=options.seed, bf16=options.bf16)
    return WarmupSettings(
        steps=options.steps, budget_s=options.budget_s, seed=options.seed, bf16=options.bf16
    )


def _first_sequences(train: list[TokenSequence] | SequenceStream, count: int) -> list[TokenSequence]:
    """The first ones, of which a stream is left where it was."""
    if not isinstance(train, SequenceStream):
        return train[:count]
    position = train.state_dict()
    first = list(islice(train, count))
    train.load_state_dict(position)
    return first


def plan_training(settings: TrainSettings) -> list[int]:
    """Lengths to be tried in turn. Raises what config and record have against these settings."""
    _, config = read_config(settings.model_dir)
    dsa = dsa_of(config)
    dsa_family_for(config).require_trainable(config)
    record_of(settings.model_dir)
    if settings.teacher is not None:
        read_config(settings.teacher)
    topk = settings.topk or dsa.topk
    # A step at long length takes minutes on a CPU, and k of the sparse stage goes by the length.
    return lengths_to_try(settings.length, config, topk, most=max(DEFAULT_LENGTH, 2 * topk))


def _teacher(settings: TrainSettings, model: PreTrainedModel) -> PreTrainedModel | None:
    if settings.teacher is None:
        return None
    teacher: PreTrainedModel = load_dense(settings.teacher, model.dtype)[0].eval()
    return move(teacher.requires_grad_(False), model.device)


def _identity(
    settings: TrainSettings,
    model: PreTrainedModel,
    teacher: PreTrainedModel | None,
    source: Corpus | DataSets,
    length: int,
) -> dict[str, Any]:
    """What must be equal for one run to be the continuation of another."""
    left_out = ("out", "overwrite", "options", "texts", "device")
    return {
        **{one.name: getattr(settings, one.name) for one in fields(settings) if one.name not in left_out},
        **settings.options,
        "length": length,
        "model_dir": str(settings.model_dir),
        "data": list(settings.data),
        "stages": list(settings.stages),
        "topk": dsa_of(model.config).topk,
        "processes": processes().num_processes,
        "model_weights": weights_fingerprint(model.state_dict()),
        "teacher_weights": None if teacher is None else weights_fingerprint(teacher.state_dict()),
        "corpus": source.fingerprint,
    }


def _record(
    settings: TrainSettings, model: PreTrainedModel, length: int, found: dict[str, Any]
) -> dict[str, Any]:
    """The record of the conversion, with these stages."""
    record = record_of(settings.model_dir)
    record["stages"] = [*record["stages"], *found]
    record["stages_done"] = {**record.get("stages_done", {}), **found}
    for stage in found:
        record[stage] = {**settings.options, "length": length, "data": list(settings.data)}
    record["dsa"] = dsa_of(model.config).to_dict()
    return record


def require_savable_whole(
    model: PreTrainedModel, around: TextShards | None, tokenizer: Any, out: Path
) -> None:
    """`require_savable` of a model, or of the one that reads images around it."""
    if around is None:
        require_savable(model, tokenizer, out)
        return
    rest = sum(file.stat().st_size for file in around.files)
    nbytes = rest + sum(x.nbytes for x in indexer_state(model).values())
    require_savable(whole_of(around, model), tokenizer, out, lambda folder: nbytes)


def _save(
    model: PreTrainedModel,
    around: TextShards | None,
    tokenizer: Any,
    settings: TrainSettings,
    record: dict[str, Any],
    run: RunDir,
) -> None:
    run.save_record("conversion", record)
    extras = {RECORD_FILE: run.record("conversion"), **stage_logs(run)}
    for file in filter(Path.is_file, (settings.model_dir / STAGES_DIR).glob("*")):
        extras.setdefault(f"{STAGES_DIR}/{file.name}", file)
    card = conversion_card(record, model.config.model_type)
    if around is not None:
        model, card = filled_whole_of(around, model), card_with_images(card)
        extras |= processor_files(around)
    save_converted(model, tokenizer, settings.out, card, overwrite=settings.overwrite, extras=extras)


def stage_logs(run: RunDir) -> dict[str, Path]:
    """What training stages wrote down, by where it lies in a model directory."""
    stage = run.path / SPARSE_DIR
    logs = {LOG_FILE: stage / LOG_FILE, "warmup-layers.jsonl": run.path / WARMUP_DIR / "layers.jsonl"}
    logs |= {f"{TENSORBOARD_DIR}/{file.name}": file for file in (stage / TENSORBOARD_DIR).glob("*")}
    return {f"{STAGES_DIR}/{name}": file for name, file in logs.items() if file.exists()}


def record_of(model_dir: Path) -> dict[str, Any]:
    """How the model was made. Raises CheckpointError if the directory does not say."""
    file = model_dir / RECORD_FILE
    try:
        record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}); name what fulmen convert wrote") from error
    known = record if isinstance(record, dict) else {}
    # The card of what is made of it needs them, hours from now.
    if missing := [name for name in ("source", "made_with", "dsa", "stages", "seed") if name not in known]:
        raise CheckpointError(f"{file} lacks {', '.join(missing)}; name what fulmen convert wrote")
    return record
