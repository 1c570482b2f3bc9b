"""A conversion from source to output directory: load, inherit, warm up, save; resumable at every point."""

import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from fulmen import __version__
from fulmen.config import DsaConfig
from fulmen.data import Corpus, load_corpus, stream_of
from fulmen.errors import ConfigError
from fulmen.evaluation.variants import indexer_state
from fulmen.modeling.checkpoint import (
    ModelSource,
    load_dense,
    load_tokenizer,
    require_free_output,
    require_savable,
    save_converted,
)
from fulmen.modeling.families import accelerated, dsa_family_for, dsa_of, family_for
from fulmen.modeling.index_shape import default_dsa
from fulmen.modeling.lengths import context_of
from fulmen.pipeline.model_card import conversion_card
from fulmen.pipeline.model_config import quantized_types, read_config
from fulmen.pipeline.reporter import TrainingView, say, stage
from fulmen.pipeline.run_dir import RunDir
from fulmen.pipeline.settings import ConvertSettings
from fulmen.pipeline.texts import ConversionTexts, conversion_texts, draw_longest, lengths_to_try
from fulmen.pipeline.train import (
    LOG_FILE,
    RECORD_FILE,
    SPARSE_DIR,
    STAGES_DIR,
    SparseTexts,
    sparse_stage,
    sparse_texts,
)
from fulmen.training.processes import is_main_process, main_process_first, wait_for_all
from fulmen.training.sharding import is_sharded
from fulmen.training.sparse.settings import SparseSettings
from fulmen.training.warmup.trainer import WarmupSettings, warm_up

BUDGET_WINDOWS = 2


class _Plan(NamedTuple):
    """What a conversion will do, as far as the config tells. lengths: of texts, to be tried in turn."""

    dsa: DsaConfig
    lengths: list[int]
    context: int | None


def convert(settings: ConvertSettings) -> Path:
    """Run a conversion as `fulmen convert` does. Raises every FulmenError its parts raise."""
    out = settings.out.expanduser().absolute()
    if is_sharded():
        raise ConfigError(
            "a conversion cannot be sharded; launch it without --use_fsdp, then fulmen train with"
        )
    require_free_output(out, overwrite=settings.overwrite)
    source, config = read_config(settings.source)
    plan = plan_conversion(settings, config)
    with stage("Read data"):
        corpus = load_corpus(*settings.data)
        tokenizer = load_tokenizer(source, config.vocab_size)
        texts, sparse = _texts(plan, corpus, tokenizer, settings)
    model = _load(source, settings, plan)
    main_process_first(lambda: require_savable(model, tokenizer, out))
    run = RunDir(out)
    identity = _identity(settings, corpus, plan.dsa, texts.length)
    if main_process_first(lambda: run.open(identity, discard_other=settings.overwrite)):
        say("Resuming an interrupted conversion")
    with accelerated(model):
        records: dict[str, Any] = {"inherit": main_process_first(lambda: _inherit(model, texts, run))}
        if "warmup" in settings.stages:
            records["warmup"] = _warm_up(model, texts, settings, run)
        if "sparse" in settings.stages:
            assert sparse is not None
            records["sparse"] = asdict(sparse_stage(model, sparse, _sparse(settings), run.path / SPARSE_DIR))
    record = {
        **identity,
        "window": texts.length,
        "dsa": dsa_of(model.config).to_dict(),
        "stages_done": records,
        "made_with": _versions(),
    }
    if is_main_process():
        with stage("Save"):
            _save(model, tokenizer, out, record, run, overwrite=settings.overwrite)
            run.remove()
    wait_for_all()
    say(f"Wrote {settings.out}; next: fulmen eval {settings.out} --html report.html")
    return out


def _load(source: ModelSource, settings: ConvertSettings, plan: _Plan) -> PreTrainedModel:
    """The source as a DSA model with random indexers."""
    say(f"Loading {settings.source}")
    dtype = settings.dtype if settings.dtype == "auto" else getattr(torch, settings.dtype)
    with stage("Load"):
        dense = load_dense(settings.source, dtype)[0]
        model = family_for(dense.config).from_dense(dense, plan.dsa).eval()
    if types := quantized_types(source):
        loaded = str(dense.dtype).removeprefix("torch.")
        say(f"Its weights ({', '.join(types)}) are dequantized to {loaded}; --dtype decides")
    return model


def plan_conversion(settings: ConvertSettings, config: PreTrainedConfig) -> _Plan:
    """Raises what the config has against these settings, before weights are loaded."""
    dsa = default_dsa(config, settings.topk, settings.index_heads, settings.index_head_dim)
    family_for(config).require_convertible(config, dsa)
    if "sparse" in settings.stages:
        family_for(config).require_trainable(config)
    return _Plan(dsa, lengths_to_try(settings.window, config, dsa.topk), context_of(config))


def _texts(
    plan: _Plan, corpus: Corpus, tokenizer: Any, settings: ConvertSettings
) -> tuple[ConversionTexts, SparseTexts | None]:
    """All that the stages read. Raises as `conversion_texts` and `sparse_texts`."""
    trains = set(settings.stages) != {"inherit"}
    source = (stream_of(*settings.data) or corpus) if "sparse" in settings.stages else None

    def draw(length: int) -> tuple[ConversionTexts, SparseTexts | None]:
        texts = conversion_texts(corpus, tokenizer, length, plan.context, settings.seed, trains=trains)
        if source is None:
            return texts, None
        return texts, sparse_texts(source, tokenizer, length, None, _sparse(settings))

    return draw_longest(plan.lengths, draw)


def _sparse(settings: ConvertSettings) -> SparseSettings:
    steps, budget_s = settings.sparse_steps, settings.sparse_budget_s
    return SparseSettings(steps=steps, budget_s=budget_s, seed=settings.seed)


def _identity(settings: ConvertSettings, corpus: Corpus, dsa: DsaConfig, window: int) -> dict[str, Any]:
    """What must be equal for one run to be the continuation of another."""
    asked = {key: value for key, value in asdict(settings).items() if key not in ("out", "overwrite", "data")}
    plain = {**asked, "stages": list(settings.stages), "data": [str(path) for path in settings.data]}
    return {**plain, "window": window, "corpus": corpus.fingerprint, "dsa": dsa.to_dict()}


def _inherit(model: PreTrainedModel, texts: ConversionTexts, run: RunDir) -> list[dict[str, Any]]:
    family = dsa_family_for(model.config)
    if (done := run.load_done("inherit")) is not None:
        model.load_state_dict(done[0], strict=False)
        family.restore_topk(model, done[1])
        return done[1]
    ids_BT = torch.stack([text.input_ids for text in texts.calibration]).to(model.device)
    if family.varies_topk:
        _share_k(model, ids_BT[:BUDGET_WINDOWS])
    n_layers = len(dsa_of(model.config).layers)
    with stage("Inherit") as advance:
        advance(0, n_layers, f"{len(ids_BT)} texts of {ids_BT.shape[1]} tokens")
        fits: list[Any] = []

        def on_layer(fit: Any) -> None:
            fits.append(fit)
            advance(len(fits), n_layers, f"KL {fit.kl:.2f}")

        layers = family.inherit(model, ids_BT, on_layer)
    record = [layer._asdict() for layer in layers]
    run.save_record("inherit", record)
    run.save_stage("inherit", indexer_state(model))
    return record


def _share_k(model: PreTrainedModel, ids_BT: torch.Tensor) -> None:
    n_layers = len(dsa_of(model.config).layers)
    with stage("Share k") as advance:
        advance(0, n_layers)
        dsa_family_for(model.config).fit_topk(model, ids_BT, lambda done: advance(done, n_layers))


def _warm_up(
    model: PreTrainedModel, texts: ConversionTexts, settings: ConvertSettings, run: RunDir
) -> dict[str, Any]:
    if (done := run.load_done("warmup")) is not None:
        model.load_state_dict(done[0], strict=False)
        return done[1]
    warmup = WarmupSettings(steps=settings.steps, budget_s=settings.budget_s, seed=settings.seed)
    with stage("Warm-up") as advance:
        view = TrainingView(advance)
        drawn = (texts.training, texts.validation)
        result = warm_up(model, *drawn, run.path / "warmup", warmup, view.step, view.part)
    say(
        f"Warm-up: validation loss {result.loss_before:.4f} -> {result.loss_after:.4f} "
        f"(step {result.best_step} of {result.last_step}, {result.seconds:.0f} s)"
    )
    if is_main_process():
        run.save_record("warmup", asdict(result))
        run.save_stage("warmup", indexer_state(model))
    return asdict(result)


def _save(
    model: PreTrainedModel, tokenizer: Any, out: Path, record: dict[str, Any], run: RunDir, *, overwrite: bool
) -> None:
    extras = {f"{STAGES_DIR}/inherit.safetensors": run.stage("inherit")}
    if (log := run.path / "warmup" / "layers.jsonl").exists():
        extras[f"{STAGES_DIR}/warmup-layers.jsonl"] = log
    if (log := run.path / SPARSE_DIR / LOG_FILE).exists():
        extras[f"{STAGES_DIR}/{LOG_FILE}"] = log
    run.save_record("conversion", record)
    extras[RECORD_FILE] = run.record("conversion")
    save_converted(
        model,
        tokenizer,
        out,
        conversion_card(record, model.config.model_type),
        overwrite=overwrite,
        extras=extras,
    )


def _versions() -> dict[str, str]:
    return {
        "fulmen": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
