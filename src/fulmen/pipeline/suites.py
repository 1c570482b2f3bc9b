"""A run of suites from a model's name to its report: load, ask; results are kept as they come."""

import hashlib
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from fulmen.data import Corpus
from fulmen.errors import CheckpointError, ConfigError, first_line
from fulmen.evaluation.journal import Journal
from fulmen.evaluation.provenance import about_run
from fulmen.evaluation.suites.catalog import all_suites, find_suite, require_known_tasks
from fulmen.evaluation.suites.endpoint import EndpointResponder
from fulmen.evaluation.suites.report import SuiteReport
from fulmen.evaluation.suites.responders import LocalResponder, Responder
from fulmen.evaluation.suites.run import (
    SuitePlan,
    require_fit,
    require_within,
    run_suites,
)
from fulmen.modeling.checkpoint import (
    ModelSource,
    find_source,
    load_dense,
    load_directory_model,
    load_tokenizer,
)
from fulmen.modeling.lengths import usual_length
from fulmen.pipeline.devices import device_of, move
from fulmen.pipeline.load import load_converted_model
from fulmen.pipeline.model_config import read_config
from fulmen.pipeline.reporter import Reporter
from fulmen.pipeline.suite_settings import ALL, PARITY, SHORTEST_POWER, SuiteSettings, lengths_up_to
from fulmen.pipeline.texts import read_corpus
from fulmen.training.sparse.teacher import require_same_tokens
from fulmen.version import __version__

SAMPLES_FILE = "samples.jsonl"
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".gguf")
# Lengths of an endpoint's model are not known.
ENDPOINT_CONTEXT = 8192


def suites_of(settings: SuiteSettings) -> tuple[str, ...]:
    """The suites asked for; of "all", those that the model can run.

    Raises:
        ConfigError: parity of a model without DSA; an unknown task; a device that is not here.
        CheckpointError: there is no such model.
    """
    require_known_tasks(settings.tasks)
    _device(settings)
    converted = settings.url is None and _has_dsa(_config_values(find_source(settings.source)))
    if ALL not in settings.suites:
        if PARITY in settings.suites and not converted:
            raise ConfigError(
                f"suite='parity' compares DSA with dense, and {settings.source} has no DSA; convert it first"
            )
        return settings.suites
    if converted:
        return (PARITY, *(suite.name for suite in all_suites()))
    without_weights = settings.url is not None
    return tuple(
        suite.name
        for suite in all_suites()
        if not suite.needs_dsa and not (suite.needs_weights and without_weights)
    )


def run_suite_settings(settings: SuiteSettings, suites: tuple[str, ...], reporter: Reporter) -> SuiteReport:
    """Run suites; only samples are written, if there is a folder for them. Raises what its parts raise."""
    device = _device(settings)
    with reporter.stage("Read data"):
        require_runnable(settings, suites)
        corpus = read_corpus(settings.data, settings.texts)
        tokenizer = load_responder_tokenizer(settings)
    reporter.note(f"Loading {settings.model or settings.source}")
    with reporter.stage("Load"):
        responder = load_responder(settings, tokenizer, device)
    plan = SuitePlan(
        suites=suites,
        lengths=lengths_of(settings, responder.context, responder.topk),
        samples=settings.samples,
        tasks=settings.tasks,
        seed=settings.seed,
    )
    require_fit(responder, plan)
    with tempfile.TemporaryDirectory() as unkept:
        folder = Path(unkept) if settings.out is None else settings.out.expanduser()
        journal = Journal(folder / SAMPLES_FILE, _identity(settings, corpus, responder))
        with reporter.stage("Evaluate", counted=False):
            report = run_suites(responder, tokenizer, corpus.heldout, plan, journal, reporter.advance)
    sparse = f", k = {responder.topk}" if responder.topk else ""
    dense = f", dense: {settings.dense}" if settings.dense else ""
    sizes = f"{plan.samples} samples of each task and length, seed {plan.seed}{sparse}{dense}"
    about = {**about_run(settings.model or settings.source), "sizes": sizes}
    return replace(report, about=about)


def _device(settings: SuiteSettings) -> torch.device | None:
    """Where to compute; None: an endpoint does. Raises ConfigError."""
    return None if settings.url else device_of(settings.device)


def require_runnable(settings: SuiteSettings, suites: tuple[str, ...]) -> None:
    """Raise ConfigError for what the model's config has against these settings, before it is loaded."""
    if settings.url is not None:
        # An endpoint is quick to ask, and says nothing of its model.
        return
    values = _config_values(find_source(settings.source))
    has_dsa = _has_dsa(values)
    if settings.topk is not None and not has_dsa:
        raise ConfigError(f"topk={settings.topk} is for a converted model; {settings.source} has no DSA")
    if settings.dense is not None and not has_dsa:
        raise ConfigError(
            f"dense is what a converted model is compared with; {settings.source} has no DSA",
            arguments=["dense"],
        )
    for name in suites:
        if find_suite(name).needs_dsa and not has_dsa:
            raise ConfigError(
                f"suite={name!r} compares DSA with dense, and {settings.source} has no DSA; convert it first"
            )
    if context := values.get("max_position_embeddings"):
        require_within(lengths_of(settings, context, settings.topk), context)


def lengths_of(settings: SuiteSettings, context: int | None, topk: int | None) -> tuple[int, ...]:
    """As asked for; else what a `topk` (None: without DSA) wants, half of that too, within the context."""
    if settings.lengths is None:
        longest = usual_length(topk or 0, context)
        # Half of a small context has no room for some questions.
        return (longest // 2, longest) if longest // 2 >= SHORTEST_POWER else (longest,)
    return settings.lengths or lengths_up_to(context or ENDPOINT_CONTEXT)


def load_responder_tokenizer(settings: SuiteSettings) -> Any:
    """The tokenizer that counts; that of a dense model to compare with must be the same.

    Raises:
        CheckpointError: one cannot be loaded.
        ConfigError: they differ.
    """
    tokenizer = load_tokenizer(find_source(settings.source))
    if settings.dense is not None:
        require_same_tokens(tokenizer, load_tokenizer(find_source(settings.dense)))
    return tokenizer


def load_responder(settings: SuiteSettings, tokenizer: Any, device: torch.device | None = None) -> Responder:
    """Who is asked; a model that runs here does so on `device`, None: on the CPU.

    Raises:
        CheckpointError: the model cannot be loaded.
        EndpointError: the endpoint cannot be reached, or lacks the model.
        ConfigError: a topk for a model without DSA; a device without room for it.
    """
    found = find_source(settings.source)
    if settings.url is not None:
        assert settings.model is not None
        return EndpointResponder(settings.url, settings.model, tokenizer)
    dense = None
    if _has_dsa(_config_values(found)):
        model = load_converted_model(settings.source)
        if settings.dense is not None:
            dense = load_dense(settings.dense, model.dtype)[0].eval()
    elif found.gguf_file:
        model = load_dense(settings.source)[0]
    else:
        # Any model of Transformers, known to a family or not: nothing of it is changed.
        model = load_directory_model(found.place)
    if device is not None:
        model, dense = move(model, device), None if dense is None else move(dense, device)
    return LocalResponder(model.eval(), tokenizer, settings.topk, dense)


def _config_values(found: ModelSource) -> dict[str, Any]:
    """config.json, of any model; of a GGUF file what Transformers makes of its header."""
    if found.gguf_file:
        return read_config(str(found))[1].to_dict()
    values = _loaded(found, lambda: PreTrainedConfig.get_config_dict(found.place))[0]
    return values if isinstance(values, dict) else {}


def _has_dsa(values: dict[str, Any]) -> bool:
    return bool(values.get("dsa") or values.get("index_topk"))


def _loaded(found: ModelSource, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except Exception as error:
        raise CheckpointError(
            f"{found} cannot be loaded ({first_line(error)}); name a whole model"
        ) from error


def _identity(settings: SuiteSettings, corpus: Corpus, responder: Responder) -> dict[str, Any]:
    """What results on disk must have in common with this run; how many there are is not part of it."""
    return {
        "model": settings.model or settings.source,
        "url": settings.url,
        "weights": None if settings.url else _weights_mark(find_source(settings.source)),
        "dense": settings.dense,
        "topk": responder.topk,
        "corpus": corpus.fingerprint,
        "seed": settings.seed,
        "fulmen": __version__,
    }


def _weights_mark(found: ModelSource) -> str:
    """Changes when a model on this disk is written anew: sizes and times of its files."""
    folder = Path(found.place)
    files = sorted(file for file in folder.glob("*") if file.suffix in WEIGHT_SUFFIXES)
    facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16] if facts else found.place
