"""A conversion from source to output directory: load, inherit, warm up, save; resumable at every point."""

import json
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from fulmen.config import DsaConfig
from fulmen.data import Corpus
from fulmen.errors import ConfigError
from fulmen.evaluation.variants import indexer_state
from fulmen.modeling.checkpoint import require_free_output, require_savable, save_converted
from fulmen.modeling.config_checks import require_sound_templates
from fulmen.modeling.families import accelerated, dsa_family_for, dsa_of, family_for
from fulmen.modeling.index_shape import one_level_reason
from fulmen.modeling.text_part import TextShards, filled_whole_of, processor_files, whole_of
from fulmen.modeling.token_blocks import feed_forward_in_blocks
from fulmen.pipeline.conversion import Conversion
from fulmen.pipeline.conversion_plan import FittedPlan, Planner, left_out
from fulmen.pipeline.devices import CPU, training_device
from fulmen.pipeline.inherit_by_layers import inherit_by_layers
from fulmen.pipeline.inherit_stage import fit_layers, share_k, try_splits, with_shares
from fulmen.pipeline.model_card import card_with_images, conversion_card
from fulmen.pipeline.model_source import DenseSource, dense_source
from fulmen.pipeline.reporter import Reporter
from fulmen.pipeline.run_dir import RunDir
from fulmen.pipeline.settings import AUTO_DEVICE, ConvertSettings, ModelInMemory
from fulmen.pipeline.texts import (
    ConversionTexts,
    conversion_texts,
    draw_longest,
    read_corpus,
    read_stream,
)
from fulmen.pipeline.train import (
    RECORD_FILE,
    SPARSE_DIR,
    STAGES_DIR,
    SparseTexts,
    record_of,
    require_savable_whole,
    sparse_stage,
    sparse_texts,
    stage_logs,
)
from fulmen.pipeline.warmup import warmup_stage
from fulmen.training.processes import is_main_process, main_process_first, wait_for_all
from fulmen.training.sharding import is_sharded
from fulmen.training.sparse.settings import SparseSettings
from fulmen.training.warmup.settings import WarmupSettings
from fulmen.version import __version__

# DeepSeek's chats are written by code, not by a template.
V32_USER_TOKEN = "<｜User｜>"


@dataclass(frozen=True)
class _Work:
    """What every stage needs beside the model: what is asked for, where the run is kept, whom to tell."""

    settings: ConvertSettings
    run: RunDir
    reporter: Reporter


def run_conversion(settings: ConvertSettings, reporter: Reporter) -> Conversion:
    """Run a conversion. Raises every FulmenError its parts raise."""
    out = settings.out.expanduser().absolute()
    if is_sharded():
        raise ConfigError(
            "a conversion cannot be sharded; launch it without --use_fsdp, then fulmen train with"
        )
    device = _device(settings)
    require_free_output(out, overwrite=settings.overwrite)
    with reporter.stage("Read data"):
        source = dense_source(settings.source)
        asked, planner = settings, Planner(source, RunDir(out).settings(), device)
        settings = planner.settled(asked)
        around = source.around()
        _require_weights_kept(settings, around)
        skipped = left_out(asked, settings, source, reporter)
        plan = planner.plan(settings)
        unusual = source.look_at_files()
        tokenizer = source.tokenizer()
        require_sound_templates(tokenizer, source.name)
        for line in [*unusual, *_missing_template(tokenizer), *_one_level(plan, settings, source)]:
            reporter.note(line)
        corpus = read_corpus(settings.data, settings.texts)
        texts, sparse = _texts(plan, corpus, tokenizer, settings, reporter)
    work = _Work(settings, RunDir(out), reporter)
    identity = _identity(settings, source, corpus, plan, texts.length)
    if settings.by_layers:
        return _convert_by_layers(source, tokenizer, texts, work, identity, skipped)
    model = _load(source, settings, plan, device, reporter)
    to_change = "sparse" in settings.asked_stages
    main_process_first(lambda: _require_savable(model, around, tokenizer, out, to_change=to_change))
    main_process_first(lambda: _open_run(work, identity))
    with accelerated(model):
        records = _run_stages(model, texts, sparse, work)
    record = _record(model, identity, records)
    if is_main_process():
        with reporter.stage("Save"):
            _save(model, around, tokenizer, record, work)
            work.run.remove()
    wait_for_all()
    return Conversion(out, record)


def _require_weights_kept(settings: ConvertSettings, around: TextShards | None) -> None:
    """Raise ConfigError for another dtype of a model that reads images: its vision tower stays as it is."""
    if around is not None and settings.dtype != "auto":
        raise ConfigError(
            f"{around.folder} reads images, and its weights keep their types; leave out dtype",
            arguments=["dtype"],
        )


def _require_savable(
    model: PreTrainedModel, around: TextShards | None, tokenizer: Any, out: Path, *, to_change: bool
) -> None:
    if around is None or to_change:
        require_savable_whole(model, around, tokenizer, out)
    else:
        # A file of the run, one for the last stage and one of the output.
        nbytes = 3 * sum(x.nbytes for x in indexer_state(model).values())
        size_in = around.bytes_to_copy
        require_savable(whole_of(around, model), tokenizer, out, lambda folder: size_in(folder) + nbytes)


def _missing_template(tokenizer: Any) -> list[str]:
    """A line if chats cannot be written: neither by a template nor as DeepSeek's models have them."""
    if tokenizer.chat_template or V32_USER_TOKEN in tokenizer.get_vocab():
        return []
    return ["Its tokenizer has no chat template: it completes text, and cannot be asked in chats"]


def _one_level(plan: FittedPlan, settings: ConvertSettings, source: DenseSource) -> list[str]:
    """A line if nobody has asked for one level and it has one all the same."""
    reason = None if settings.index else one_level_reason(plan.dsa, source.config)
    return [f"Its index has one level: {reason} (index decides)"] if reason else []


def _convert_by_layers(
    source: DenseSource,
    tokenizer: Any,
    texts: ConversionTexts,
    work: _Work,
    identity: dict[str, Any],
    skipped: dict[str, str],
) -> Conversion:
    """One process does it all: what it computes with fits in one machine's memory."""
    out, reporter = work.settings.out.expanduser().absolute(), work.reporter
    if not is_main_process():
        wait_for_all()
        return Conversion(out, record_of(out))
    reporter.note(f"Reading {source.name} layer by layer")
    with reporter.stage("Load"):
        device = _device(work.settings) or CPU
        layered = source.layered(DsaConfig.from_dict(identity["dsa"]), device)
        require_savable(layered.model, tokenizer, out, layered.bytes_in)
    if len(kinds := layered.shards.kinds) > 1:
        reporter.note(f"Its weights are {', '.join(kinds)}: they stay so, and run in {layered.dtype}")
    _open_run(work, identity)
    records = inherit_by_layers(layered, texts, work.run, reporter)
    record = {**_record(layered.model, identity, records), "left_out": skipped}
    with reporter.stage("Save"):
        indexers = work.run.stage("inherit")
        write = partial(layered.put_into, indexers=indexers)
        _save(layered.model, source.around(), tokenizer, record, work, write)
        work.run.remove()
    wait_for_all()
    return Conversion(out, record)


def _open_run(work: _Work, identity: dict[str, Any]) -> None:
    if work.run.open(identity, discard_other=work.settings.overwrite):
        work.reporter.note("Resuming an interrupted conversion")


def _record(model: PreTrainedModel, identity: dict[str, Any], records: dict[str, Any]) -> dict[str, Any]:
    dsa = dsa_of(model.config).to_dict()
    return {**identity, "dsa": dsa, "stages_done": records, "made_with": _versions()}


def _device(settings: ConvertSettings) -> torch.device | None:
    """Where to compute; None: where a model in memory lies. Raises ConfigError."""
    if isinstance(settings.source, ModelInMemory) and settings.device == AUTO_DEVICE:
        return None
    return training_device(settings.device)


def _texts(
    plan: FittedPlan, corpus: Corpus, tokenizer: Any, settings: ConvertSettings, reporter: Reporter
) -> tuple[ConversionTexts, SparseTexts | None]:
    """All that the stages read. Raises as `conversion_texts` and `sparse_texts`."""
    source = None
    if "sparse" in settings.asked_stages:
        source = read_stream(settings.data, settings.texts) or corpus

    def draw(length: int) -> tuple[ConversionTexts, SparseTexts | None]:
        texts = conversion_texts(
            corpus,
            tokenizer,
            length,
            plan.context,
            settings.seed,
            reporter,
            trains=settings.trains,
            calibration_tokens=plan.calibration_tokens,
        )
        if source is None:
            return texts, None
        return texts, sparse_texts(source, tokenizer, length, None, _sparse(settings), reporter)

    return draw_longest(plan.lengths, draw, reporter)


def _load(
    source: DenseSource,
    settings: ConvertSettings,
    plan: FittedPlan,
    device: torch.device | None,
    reporter: Reporter,
) -> PreTrainedModel:
    """The source as a DSA model with random indexers."""
    reporter.note(f"Loading {source.name}")
    dtype = settings.dtype if settings.dtype == "auto" else getattr(torch, settings.dtype)
    with reporter.stage("Load"):
        dense = source.load(dtype, device, to_change="sparse" in settings.asked_stages)
        model: PreTrainedModel = family_for(dense.config).from_dense(dense, plan.dsa).eval()
    if types := source.quantized:
        loaded = str(dense.dtype).removeprefix("torch.")
        reporter.note(f"Its weights ({', '.join(types)}) are dequantized to {loaded}; dtype decides")
    return model


def _sparse(settings: ConvertSettings) -> SparseSettings:
    steps, budget_s = settings.sparse_steps, settings.sparse_budget_s
    return SparseSettings(steps=steps, budget_s=budget_s, seed=settings.seed)


def _identity(
    settings: ConvertSettings, source: DenseSource, corpus: Corpus, plan: FittedPlan, length: int
) -> dict[str, Any]:
    """What must be equal for one run to be the continuation of another."""
    chosen = {
        "length": length,
        "calibration_tokens": plan.calibration_tokens,
        "corpus": corpus.fingerprint,
        "dsa": plan.dsa.to_dict(),
    }
    return {**source.identity(), **settings.plain(), **chosen}


def _run_stages(
    model: PreTrainedModel, texts: ConversionTexts, sparse: SparseTexts | None, work: _Work
) -> dict[str, Any]:
    """What each stage measured, by its name."""
    records: dict[str, Any] = {"inherit": main_process_first(lambda: _inherit(model, texts, work))}
    if work.run.record("splits").exists():
        records["splits"] = json.loads(work.run.record("splits").read_text(encoding="utf-8"))
    if "warmup" in work.settings.asked_stages:
        records["warmup"] = _warm_up(model, texts, work)
    if sparse is not None:
        folder = work.run.path / SPARSE_DIR
        records["sparse"] = asdict(sparse_stage(model, sparse, _sparse(work.settings), folder, work.reporter))
    return records


def _inherit(model: PreTrainedModel, texts: ConversionTexts, work: _Work) -> list[dict[str, Any]]:
    family = dsa_family_for(model.config)
    if (done := work.run.load_done("inherit")) is not None:
        indexers, fits = done
        model.load_state_dict(indexers, strict=False)
        family.restore_topk(model, fits)
        return list(fits)
    ids_BT = torch.stack([text.input_ids for text in texts.calibration]).to(model.device)
    with feed_forward_in_blocks(model):
        share_k(model, ids_BT, work.reporter)
        record = fit_layers(model, ids_BT, work.reporter)
        tried = try_splits(model, texts.answered, model.device, work.reporter)
    if tried:
        work.run.save_record("splits", [split._asdict() for split in tried])
    record = with_shares(record, tried)
    work.run.save_record("inherit", record)
    work.run.save_stage("inherit", indexer_state(model))
    return record


def _warm_up(model: PreTrainedModel, texts: ConversionTexts, work: _Work) -> dict[str, Any]:
    settings = work.settings
    warmup = WarmupSettings(steps=settings.steps, budget_s=settings.budget_s, seed=settings.seed)
    return warmup_stage(model, texts.training, texts.validation, warmup, work.run, work.reporter)


def _save(
    model: PreTrainedModel,
    around: TextShards | None,
    tokenizer: Any,
    record: dict[str, Any],
    work: _Work,
    write_weights: Callable[[Path], None] | None = None,
) -> None:
    run = work.run
    extras = {f"{STAGES_DIR}/inherit.safetensors": run.stage("inherit"), **stage_logs(run)}
    run.save_record("conversion", record)
    extras[RECORD_FILE] = run.record("conversion")
    card = conversion_card(record, model.config.model_type)
    if around is not None:
        card = card_with_images(card)
        extras |= processor_files(around)
        if "sparse" in work.settings.asked_stages:
            model = filled_whole_of(around, model)
        else:
            last = "warmup" if "warmup" in work.settings.asked_stages else "inherit"
            write_weights = write_weights or partial(around.put_into, more=run.stage(last))
            model = whole_of(around, model)
    save_converted(
        model,
        tokenizer,
        work.settings.out,
        card,
        overwrite=work.settings.overwrite,
        extras=extras,
        write_weights=write_weights,
    )


def _versions() -> dict[str, str]:
    return {
        "fulmen": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
