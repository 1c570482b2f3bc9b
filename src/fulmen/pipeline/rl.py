"""`fulmen rl`: a model, dense or converted, trained by what its tasks reward; resumable."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from fulmen.errors import EngineError
from fulmen.evaluation.learning.report import LearningReport, learning_report
from fulmen.evaluation.provenance import about_run
from fulmen.evaluation.report_files import save_report
from fulmen.memory import available_bytes
from fulmen.modeling.checkpoint import (
    ModelSource,
    load_dense,
    load_tokenizer,
    require_free_output,
    require_savable,
    save_converted,
)
from fulmen.modeling.families import accelerated, dsa_family_for, has_dsa
from fulmen.modeling.rollouts import RolloutEngine
from fulmen.pipeline.answers import AT_ONCE, open_model
from fulmen.pipeline.conversion import Conversion
from fulmen.pipeline.devices import training_device
from fulmen.pipeline.fingerprint import weights_fingerprint
from fulmen.pipeline.model_config import read_config, require_language_model_alone
from fulmen.pipeline.post_trained import record_before, save_post_trained
from fulmen.pipeline.reporter import Reporter, TrainingView
from fulmen.pipeline.rl_plan import fitting_micro_batch, plan_rl
from fulmen.pipeline.rl_settings import RL_SETTINGS_FILE, RlRunSettings
from fulmen.pipeline.run_dir import RunDir
from fulmen.tasks import named
from fulmen.tasks.base import HELD_OUT, Task
from fulmen.training.processes import main_process_first, processes
from fulmen.training.prompts import ends_of, pad_of
from fulmen.training.rl.episodes import require_room
from fulmen.training.rl.generate_engine import GenerateRollouts
from fulmen.training.rl.prompts import prompt_tokens
from fulmen.training.rl.run import METRICS_FILE, RlResult, train_rl
from fulmen.training.rl.settings import Domain, RlSettings

RL_DIR, ENGINE_DIR = "rl", "engine-model"
REPORT_FILES = {"json": "rl.json", "markdown": "rl.md", "html": "rl.html"}
VLLM_MODULE = "fulmen.serving.engine.rollouts"
# Of each task, problems whose prompts are looked at to know how long they get.
MEASURED_PROBLEMS = 16


def run_rl(settings: RlRunSettings, reporter: Reporter) -> Conversion:
    """Run it. Raises every FulmenError its parts raise."""
    out = settings.out.expanduser().absolute()
    options = RlSettings(**settings.options)
    device = training_device(settings.device)
    require_free_output(out, overwrite=settings.overwrite)
    with reporter.stage("Read tasks"):
        found, config = read_config(settings.model)
        require_language_model_alone(settings.model, "rl")
        record = record_before(settings.model, has_dsa(config))
        if has_dsa(config):
            dsa_family_for(config).require_trainable(config)
        tokenizer = load_tokenizer(found, config.get_text_config().vocab_size)
        domains = [Domain(task_of(asked.task), asked.kl) for asked in settings.tasks]
        prompt = _longest_prompt(options, domains, tokenizer)
        if options.micro_batch is None:
            fitting = fitting_micro_batch(config, options, prompt, processes().num_processes)
            options = replace(options, micro_batch=fitting)
        length = _require_plan(settings, config, options, domains, prompt, device, reporter)
        require_engine(settings.rollouts)
    reporter.note(f"Loading {settings.model}")
    with reporter.stage("Load"):
        model, tokenizer = open_model(settings.model, device)
        main_process_first(lambda: require_savable(model, tokenizer, out))
    run, state = RunDir(out), processes()
    if state.is_main_process and run.open(
        _identity(settings, options, model), discard_other=settings.overwrite
    ):
        reporter.note("Resuming an interrupted run")
    state.wait_for_everyone()
    reporter.note(
        f"Metrics of each step: {run.path / RL_DIR / METRICS_FILE}, in the end {out / METRICS_FILE}"
    )

    def engine(policy: PreTrainedModel) -> RolloutEngine:
        if settings.rollouts == "vllm":
            return _vllm(settings, options, found, policy, tokenizer, length, run)
        ends, pad = ends_of(policy, tokenizer), pad_of(policy, tokenizer)
        return GenerateRollouts(policy, ends, pad, AT_ONCE, bf16=options.bf16)

    with reporter.stage("RL"), accelerated(model):
        view = TrainingView(reporter)
        result = train_rl(
            model,
            tokenizer,
            domains,
            engine,
            run.path / RL_DIR,
            options,
            view.step,
            view.part,
            reporter.note,
        )
    report = learning_report(result.rows, result.before, result.after, _about(settings, options))
    reporter.note(report.verdict())
    record = _record(record, settings, options, model, report, result)
    if state.is_main_process:
        with reporter.stage("Save"):
            _save(model, tokenizer, settings, options, record, report, run)
            run.remove()
    state.wait_for_everyone()
    return Conversion(out, record)


def task_of(asked: str | Task) -> Task:
    """A task by name and parameters, or as it is. Raises what `fulmen.tasks.named` has against it."""
    return named(asked) if isinstance(asked, str) else asked


def require_engine(rollouts: str) -> None:
    """Raise EngineError if what is to write the replies is not here."""
    if rollouts == "vllm" and find_spec("vllm") is None:
        raise EngineError("rollouts='vllm' needs vLLM; install fulmen[serve-cpu], or use generate")


def _longest_prompt(options: RlSettings, domains: list[Domain], tokenizer: Any) -> int:
    """Its tokens, of some problems. Raises ConfigError for a task whose turns have no room."""
    for domain in domains:
        require_room(domain.task, options.max_new_tokens)
    indices = [*range(MEASURED_PROBLEMS), *range(HELD_OUT, HELD_OUT + MEASURED_PROBLEMS)]
    return max(
        len(prompt_tokens(tokenizer, domain.task.problem(index))) for domain in domains for index in indices
    )


def _require_plan(
    settings: RlRunSettings,
    config: PreTrainedConfig,
    options: RlSettings,
    domains: list[Domain],
    prompt: int,
    device: torch.device,
    reporter: Reporter,
) -> int:
    """Say what the run takes; return the tokens of a prompt and its reply. Raises ConfigError for no room."""
    free, is_engine_apart = available_bytes(device), settings.rollouts != "generate"
    plan = plan_rl(config, options, prompt, free, is_engine_apart=is_engine_apart)
    for line in plan.lines(options, domains):
        reporter.note(line)
    plan.require_room()
    return plan.length


def _vllm(
    settings: RlRunSettings,
    options: RlSettings,
    found: ModelSource,
    policy: PreTrainedModel,
    tokenizer: Any,
    length: int,
    run: RunDir,
) -> RolloutEngine:
    """vLLM in this process, on the model's directory, or on a copy where it is none."""
    place = Path(found.place)
    if found.gguf_file or not place.is_dir():
        place = run.path / ENGINE_DIR
        source = load_dense(settings.model)[0]
        main_process_first(lambda: save_converted(source, tokenizer, place, "", overwrite=True))
    context = getattr(policy.config.get_text_config(), "max_position_embeddings", None)
    # Longer prompts than those that were looked at may come.
    most = 2 * length if context is None else min(2 * length, context)
    engine: RolloutEngine = import_module(VLLM_MODULE).VllmRollouts(
        place,
        max_model_len=most,
        memory_gib=settings.memory_gib,
        dtype="bfloat16" if options.bf16 else "float32",
        seed=options.seed,
    )
    return engine


def _identity(settings: RlRunSettings, options: RlSettings, model: PreTrainedModel) -> dict[str, Any]:
    """What must be equal for one run to be the continuation of another."""
    return {
        **asdict(options),
        "model": settings.model,
        "tasks": _task_names(settings),
        "rollouts": settings.rollouts,
        "processes": processes().num_processes,
        "model_weights": weights_fingerprint(model.state_dict()),
    }


def _task_names(settings: RlRunSettings) -> list[str]:
    return [f"{asked.label} kl={asked.kl:g}" for asked in settings.tasks]


def _record(
    before: dict[str, Any],
    settings: RlRunSettings,
    options: RlSettings,
    model: PreTrainedModel,
    report: LearningReport,
    result: RlResult,
) -> dict[str, Any]:
    """The record with this stage."""
    done = {"held_out": report.held_out, "steps": len(result.rows), "seconds": result.seconds}
    return {
        **before,
        "stages": [*before["stages"], "rl"],
        "stages_done": {**before.get("stages_done", {}), "rl": done},
        "rl": {**asdict(options), "tasks": _task_names(settings), "rollouts": settings.rollouts},
    }


def _about(settings: RlRunSettings, options: RlSettings) -> dict[str, str]:
    shown = ", ".join(f"{name}={value}" for name, value in asdict(options).items())
    about = about_run(settings.model)
    return {**about, "tasks": "; ".join(_task_names(settings)), "settings": f"{shown}, {settings.rollouts}"}


def _save(
    model: PreTrainedModel,
    tokenizer: Any,
    settings: RlRunSettings,
    options: RlSettings,
    record: Mapping[str, Any],
    report: LearningReport,
    run: RunDir,
) -> None:
    tasks = [asked.to_dict() for asked in settings.tasks]
    run.save_record("rl-settings", {"model": settings.model, "tasks": tasks, "options": asdict(options)})
    files = {kind: run.path / name for kind, name in REPORT_FILES.items()}
    save_report(report, **files)
    extras = {file.name: file for file in files.values()}
    extras[METRICS_FILE] = run.path / RL_DIR / METRICS_FILE
    extras[RL_SETTINGS_FILE] = run.record("rl-settings")
    section = f"\n## Reinforcement learning\n\n{report.to_markdown()}"
    save_post_trained(
        model,
        tokenizer,
        settings.model,
        settings.out,
        record,
        section,
        extras,
        run,
        overwrite=settings.overwrite,
    )
