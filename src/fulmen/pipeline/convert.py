"""A conversion from source to output directory: load, inherit, warm up, save; resumable at every point."""

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from fulmen.config import DsaConfig
from fulmen.data import Corpus, TokenSequence
from fulmen.errors import ConfigError
from fulmen.evaluation.variants import indexer_state
from fulmen.modeling.checkpoint import require_free_output, require_savable, save_converted
from fulmen.modeling.families import accelerated, dsa_family_for, dsa_of, family_for
from fulmen.modeling.family import AnsweredText, TriedSplit
from fulmen.modeling.index_shape import default_dsa
from fulmen.modeling.lengths import context_of, untrained_topk
from fulmen.modeling.token_blocks import feed_forward_in_blocks
from fulmen.pipeline.conversion import Conversion
from fulmen.pipeline.devices import training_device
from fulmen.pipeline.model_card import conversion_card
from fulmen.pipeline.model_source import DenseSource, dense_source
from fulmen.pipeline.reporter import Reporter
from fulmen.pipeline.run_dir import RunDir
from fulmen.pipeline.settings import AUTO_DEVICE, ConvertSettings, ModelInMemory
from fulmen.pipeline.texts import (
    ConversionTexts,
    conversion_texts,
    draw_longest,
    lengths_to_try,
    read_corpus,
    read_stream,
)
from fulmen.pipeline.train import (
    RECORD_FILE,
    SPARSE_DIR,
    STAGES_DIR,
    SparseTexts,
    sparse_stage,
    sparse_texts,
    stage_logs,
)
from fulmen.pipeline.warmup import warmup_stage
from fulmen.training.processes import is_main_process, main_process_first, wait_for_all
from fulmen.training.rows import before_answers
from fulmen.training.sharding import is_sharded
from fulmen.training.sparse.settings import SparseSettings
from fulmen.training.warmup.settings import WarmupSettings
from fulmen.version import __version__

BUDGET_SEQUENCES = 2


class _Plan(NamedTuple):
    """What a conversion will do, as far as the config tells. lengths: of sequences, to be tried in turn."""

    dsa: DsaConfig
    lengths: list[int]
    context: int | None


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
        plan = plan_conversion(settings, source.config)
        tokenizer = source.tokenizer()
        corpus = read_corpus(settings.data, settings.texts)
        texts, sparse = _texts(plan, corpus, tokenizer, settings, reporter)
    model = _load(source, settings, plan, device, reporter)
    main_process_first(lambda: require_savable(model, tokenizer, out))
    work = _Work(settings, RunDir(out), reporter)
    identity = _identity(settings, source, corpus, plan.dsa, texts.length)
    if main_process_first(lambda: work.run.open(identity, discard_other=settings.overwrite)):
        reporter.note("Resuming an interrupted conversion")
    with accelerated(model):
        records = _run_stages(model, texts, sparse, work)
    dsa = dsa_of(model.config).to_dict()
    record = {**identity, "dsa": dsa, "stages_done": records, "made_with": _versions()}
    if is_main_process():
        with reporter.stage("Save"):
            _save(model, tokenizer, out, record, work)
            work.run.remove()
    wait_for_all()
    return Conversion(out, record)


def _device(settings: ConvertSettings) -> torch.device | None:
    """Where to compute; None: where a model in memory lies. Raises ConfigError."""
    if isinstance(settings.source, ModelInMemory) and settings.device == AUTO_DEVICE:
        return None
    return training_device(settings.device)


def plan_conversion(settings: ConvertSettings, config: PreTrainedConfig) -> _Plan:
    """Raises what the config has against these settings, before weights are loaded."""
    topk = settings.topk
    if topk is None and set(settings.stages) == {"inherit"}:
        topk = untrained_topk(config, settings.length)
    dsa = default_dsa(config, topk, settings.index_heads, settings.index_head_dim, settings.index)
    family_for(config).require_convertible(config, dsa)
    if "sparse" in settings.stages:
        family_for(config).require_trainable(config)
    return _Plan(dsa, lengths_to_try(settings.length, config, dsa.topk), context_of(config))


def _texts(
    plan: _Plan, corpus: Corpus, tokenizer: Any, settings: ConvertSettings, reporter: Reporter
) -> tuple[ConversionTexts, SparseTexts | None]:
    """All that the stages read. Raises as `conversion_texts` and `sparse_texts`."""
    trains = set(settings.stages) != {"inherit"}
    source = None
    if "sparse" in settings.stages:
        source = read_stream(settings.data, settings.texts) or corpus

    def draw(length: int) -> tuple[ConversionTexts, SparseTexts | None]:
        texts = conversion_texts(
            corpus, tokenizer, length, plan.context, settings.seed, reporter, trains=trains
        )
        if source is None:
            return texts, None
        return texts, sparse_texts(source, tokenizer, length, None, _sparse(settings), reporter)

    return draw_longest(plan.lengths, draw, reporter)


def _load(
    source: DenseSource,
    settings: ConvertSettings,
    plan: _Plan,
    device: torch.device | None,
    reporter: Reporter,
) -> PreTrainedModel:
    """The source as a DSA model with random indexers."""
    reporter.note(f"Loading {source.name}")
    dtype = settings.dtype if settings.dtype == "auto" else getattr(torch, settings.dtype)
    with reporter.stage("Load"):
        dense = source.load(dtype, device, to_change="sparse" in settings.stages)
        model: PreTrainedModel = family_for(dense.config).from_dense(dense, plan.dsa).eval()
    if types := source.quantized:
        loaded = str(dense.dtype).removeprefix("torch.")
        reporter.note(f"Its weights ({', '.join(types)}) are dequantized to {loaded}; dtype decides")
    return model


def _sparse(settings: ConvertSettings) -> SparseSettings:
    steps, budget_s = settings.sparse_steps, settings.sparse_budget_s
    return SparseSettings(steps=steps, budget_s=budget_s, seed=settings.seed)


def _identity(
    settings: ConvertSettings, source: DenseSource, corpus: Corpus, dsa: DsaConfig, length: int
) -> dict[str, Any]:
    """What must be equal for one run to be the continuation of another."""
    chosen = {"length": length, "corpus": corpus.fingerprint, "dsa": dsa.to_dict()}
    return {**source.identity(), **settings.plain(), **chosen}


def _run_stages(
    model: PreTrainedModel, texts: ConversionTexts, sparse: SparseTexts | None, work: _Work
) -> dict[str, Any]:
    """What each stage measured, by its name."""
    records: dict[str, Any] = {"inherit": main_process_first(lambda: _inherit(model, texts, work))}
    if work.run.record("splits").exists():
        records["splits"] = json.loads(work.run.record("splits").read_text(encoding="utf-8"))
    if "warmup" in work.settings.stages:
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
        if family.varies_topk:
            _share_k(model, ids_BT[:BUDGET_SEQUENCES], work.reporter)
        record = [layer._asdict() for layer in _fit_layers(model, ids_BT, work.reporter)]
        tried = _try_splits(model, texts.answered, work.reporter)
    if tried:
        work.run.save_record("splits", [split._asdict() for split in tried])
        kept = zip(record, tried[0].ratios, strict=True)
        record = [{**layer, "topk_share": ratio} for layer, ratio in kept]
    work.run.save_record("inherit", record)
    work.run.save_stage("inherit", indexer_state(model))
    return record


def _fit_layers(model: PreTrainedModel, ids_BT: torch.Tensor, reporter: Reporter) -> Any:
    n_layers = len(dsa_of(model.config).layers)
    with reporter.stage("Inherit"):
        reporter.advance(0, n_layers, f"{len(ids_BT)} sequences of {ids_BT.shape[1]} tokens")
        fits: list[Any] = []

        def on_layer(fit: Any) -> None:
            fits.append(fit)
            reporter.advance(len(fits), n_layers, f"KL {fit.kl:.2f}")

        return dsa_family_for(model.config).inherit(model, ids_BT, on_layer)


def _share_k(model: PreTrainedModel, ids_BT: torch.Tensor, reporter: Reporter) -> None:
    n_layers = len(dsa_of(model.config).layers)
    with reporter.stage("Share k"):
        reporter.advance(0, n_layers)
        dsa_family_for(model.config).fit_topk(model, ids_BT, lambda done: reporter.advance(done, n_layers))


def _try_splits(
    model: PreTrainedModel, answered: Sequence[TokenSequence], reporter: Reporter
) -> list[TriedSplit]:
    """Keep the split of k with which the model answers best, the first of those returned."""
    texts = [AnsweredText(one.input_ids.to(model.device), before_answers(one.answers)) for one in answered]
    if not (texts and dsa_family_for(model.config).varies_topk):
        return []
    with reporter.stage("Try splits of k"):
        return dsa_family_for(model.config).try_topk(
            model, texts, lambda done, total: reporter.advance(done, total, "texts")
        )


def _warm_up(model: PreTrainedModel, texts: ConversionTexts, work: _Work) -> dict[str, Any]:
    settings = work.settings
    warmup = WarmupSettings(steps=settings.steps, budget_s=settings.budget_s, seed=settings.seed)
    return warmup_stage(model, texts.training, texts.validation, warmup, work.run, work.reporter)


def _save(model: PreTrainedModel, tokenizer: Any, out: Path, record: dict[str, Any], work: _Work) -> None:
    run = work.run
    extras = {f"{STAGES_DIR}/inherit.safetensors": run.stage("inherit"), **stage_logs(run)}
    run.save_record("conversion", record)
    extras[RECORD_FILE] = run.record("conversion")
    card = conversion_card(record, model.config.model_type)
    save_converted(model, tokenizer, out, card, overwrite=work.settings.overwrite, extras=extras)


def _versions() -> dict[str, str]:
    return {
        "fulmen": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
