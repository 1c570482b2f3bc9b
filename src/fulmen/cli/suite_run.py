"""A run of suites from a model's name to its reports: load, ask, write; results are kept as they come."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.table import Table
from transformers import AutoModelForCausalLM, PreTrainedConfig

from fulmen import __version__
from fulmen.cli.chat_session import load_converted
from fulmen.cli.progress import console, progress_bar, say
from fulmen.cli.suite_settings import ALL, PARITY, SuiteSettings, lengths_up_to
from fulmen.corpus import Corpus, load_corpus
from fulmen.errors import CheckpointError, ConfigError
from fulmen.evaluation.report import about_run, write_json
from fulmen.evaluation.suite.endpoint import EndpointSubject
from fulmen.evaluation.suite.journal import Journal
from fulmen.evaluation.suite.ruler_tasks import find_tasks
from fulmen.evaluation.suite.run import NEEDS_DSA, NEEDS_WEIGHTS, SUITES, SuitePlan, require_fit, run_suites
from fulmen.evaluation.suite.subjects import LocalSubject, Subject
from fulmen.evaluation.suite.suite_page import write_suite_page
from fulmen.evaluation.suite.suite_report import suite_sections, write_suite_markdown
from fulmen.modeling.checkpoint import ModelSource, find_source, load_dense, load_tokenizer
from fulmen.training.teacher import require_same_tokens

SAMPLES_FILE = "samples.jsonl"
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".gguf")
# Lengths of an endpoint's model are not known.
ENDPOINT_CONTEXT = 8192


def suites_of(settings: SuiteSettings) -> tuple[str, ...]:
    """The suites asked for; of "all", those that the model can run.

    Raises:
        ConfigError: parity of a model without DSA; an unknown task.
        CheckpointError: there is no such model.
    """
    find_tasks(settings.tasks)
    converted = settings.url is None and _is_converted(find_source(settings.source))
    if ALL not in settings.suites:
        if PARITY in settings.suites and not converted:
            raise ConfigError(
                f"suite='parity' compares DSA with dense, and {settings.source} has no DSA; convert it first"
            )
        return settings.suites
    if converted:
        return (PARITY, *SUITES)
    lacking = NEEDS_DSA + (NEEDS_WEIGHTS if settings.url else ())
    return tuple(name for name in SUITES if name not in lacking)


def evaluate_suites(settings: SuiteSettings, suites: tuple[str, ...]) -> dict[str, Any]:
    """Run suites as `fulmen eval --suite` does and return the report. Raises what its parts raise."""
    corpus = load_corpus(*settings.data)
    say(f"Loading {settings.model or settings.source}")
    subject, tokenizer = load_subject(settings)
    context = subject.context or ENDPOINT_CONTEXT
    plan = SuitePlan(
        suites=suites,
        lengths=settings.lengths or lengths_up_to(context),
        samples=settings.samples,
        tasks=settings.tasks,
        seed=settings.seed,
    )
    require_fit(subject, plan)
    journal = Journal(settings.folder / SAMPLES_FILE, _identity(settings, corpus, subject))
    with progress_bar("Evaluate", counted=False) as advance:
        tables = run_suites(subject, tokenizer, corpus.heldout, plan, journal, lambda *done: advance(*done))
    sparse = f", k = {subject.topk}" if subject.topk else ""
    dense = f", dense: {settings.dense}" if settings.dense else ""
    sizes = f"{plan.samples} samples of each task and length, seed {plan.seed}{sparse}{dense}"
    about = {**about_run(settings.model or settings.source), "sizes": sizes}
    report = {"suites": tables, "about": about}
    _write(settings.folder, report)
    _print(report)
    return report


def load_subject(settings: SuiteSettings) -> tuple[Subject, Any]:
    """Who is asked, and the tokenizer that counts.

    Raises:
        CheckpointError: the model or the tokenizer cannot be loaded.
        EndpointError: the endpoint cannot be reached, or lacks the model.
        ConfigError: a topk for a model without DSA.
    """
    found = find_source(settings.source)
    if settings.url is not None:
        assert settings.model is not None
        tokenizer = load_tokenizer(found)
        return EndpointSubject(settings.url, settings.model, tokenizer), tokenizer
    source = None
    if _is_converted(found):
        model, tokenizer = load_converted(settings.source)
        if settings.dense is not None:
            source, own_tokenizer = load_dense(settings.dense, model.dtype)
            require_same_tokens(tokenizer, own_tokenizer)
    elif settings.dense is not None:
        raise ConfigError(f"--dense is what a converted model is compared with; {settings.source} has no DSA")
    elif found.gguf_file:
        model, tokenizer = load_dense(settings.source)
    else:
        # Any model of Transformers, known to a family or not: nothing of it is changed.
        tokenizer = load_tokenizer(found)
        model = _loaded(found, lambda: AutoModelForCausalLM.from_pretrained(found.place, dtype="auto"))
    return LocalSubject(model.eval(), tokenizer, settings.topk, source and source.eval()), tokenizer


def _is_converted(found: ModelSource) -> bool:
    if found.gguf_file:
        return False
    values, _ = _loaded(found, lambda: PreTrainedConfig.get_config_dict(found.place))
    return bool(values.get("dsa") or values.get("index_topk"))


def _loaded(found: ModelSource, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{found} cannot be loaded ({reason[:200]}); name a whole model") from error


def _identity(settings: SuiteSettings, corpus: Corpus, subject: Subject) -> dict[str, Any]:
    """What results on disk must have in common with this run; how many there are is not part of it."""
    return {
        "model": settings.model or settings.source,
        "url": settings.url,
        "weights": None if settings.url else _weights_mark(find_source(settings.source)),
        "dense": settings.dense,
        "topk": subject.topk,
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


def _write(folder: Path, report: dict[str, Any]) -> None:
    written = [
        write_json(report, folder / "suites.json"),
        write_suite_markdown(report, folder / "suites.md"),
        write_suite_page(report, folder / "suites.html"),
    ]
    say("Wrote " + ", ".join(str(path) for path in written))


def _print(report: dict[str, Any]) -> None:
    for title, notes, (header, *rows) in suite_sections(report):
        table = Table(*header, title=title)
        for row in rows:
            table.add_row(*row)
        console.print(table)
        for note in notes:
            say(note)
