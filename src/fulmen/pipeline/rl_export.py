"""`fulmen export-rl`: a run of reinforcement learning, for a trainer on many machines."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fulmen.errors import CheckpointError, ConfigError
from fulmen.files import write_folder
from fulmen.modeling.checkpoint import load_tokenizer, require_free_output
from fulmen.modeling.experts import experts_of
from fulmen.modeling.families import has_dsa
from fulmen.pipeline.model_config import read_config
from fulmen.pipeline.reporter import Reporter
from fulmen.pipeline.rl_engines import (
    ENGINES,
    ENV_CLASS,
    HELD_OUT_FILE,
    LACKS,
    TRAIN_FILE,
    EngineRun,
    model_line,
)
from fulmen.pipeline.rl_settings import RL_SETTINGS_FILE
from fulmen.tasks import named
from fulmen.tasks.base import HELD_OUT, Problem, turns_of
from fulmen.tasks.own import PREFIX
from fulmen.training.rl.prompts import prompt_tokens, training_rows
from fulmen.training.rl.settings import Domain, RlSettings


def export_run(
    run_dir: Path, engine: str, out: Path, model: str | None, steps: int | None, reporter: Reporter
) -> Path:
    """Write it. Raises every FulmenError its parts raise."""
    require_free_output(out)
    asked, settings = read_run(run_dir)
    if steps is not None:
        settings = replace(settings, steps=steps)
    domains = [_domain(one) for one in asked["tasks"]]
    place, config, tokenizer = _readable_model(model or asked["model"], engine)
    problems = _problems(domains, settings)
    longest = max(len(prompt_tokens(tokenizer, one)) for part in problems for one in part)
    run = EngineRun(
        model=place,
        settings=settings,
        kl=max(domain.kl for domain in domains),
        prompt=longest,
        has_experts=experts_of(config.get_text_config()) is not None,
        has_dsa=has_dsa(config),
    )
    texts = dict(zip((TRAIN_FILE, HELD_OUT_FILE), map(_lines, problems), strict=True))
    for name, text in ENGINES[engine](run).items():
        texts[name] = text.replace("@MODEL@", model_line(place))
    write_folder(out, {**texts, "README.md": _readme(run_dir, engine, domains)})
    for lack in LACKS[engine]:
        reporter.note(f"{engine}: {lack}")
    return out


def read_run(run_dir: Path) -> tuple[dict[str, Any], RlSettings]:
    """What a run was asked for, and its settings. Raises CheckpointError for another directory."""
    file = run_dir / RL_SETTINGS_FILE
    try:
        asked = json.loads(file.read_text(encoding="utf-8"))
        return asked, RlSettings(**asked["options"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{run_dir} has no readable {RL_SETTINGS_FILE} ({type(error).__name__}); name a directory that "
            "fulmen rl of this version wrote"
        ) from error


def _domain(asked: dict[str, Any]) -> Domain:
    """A task by a name that other machines know, files by their whole path."""
    spec: str = asked["task"]
    if not asked["is_named"]:
        raise ConfigError(
            f"task {spec!r} was an object of a program, which other machines cannot make; give it to "
            "fulmen rl by name, as python:FILE.py:NAME"
        )
    place, separator, rest = spec.removeprefix(PREFIX).partition(".py:")
    if spec.startswith(PREFIX) and separator:
        spec = f"{PREFIX}{Path(f'{place}.py').expanduser().absolute()}:{rest}"
    task = named(spec)
    if turns_of(task) > 1:
        raise ConfigError(f"task {spec!r} has several turns, and exports are of one; train it with fulmen rl")
    return Domain(task, asked["kl"])


def _readable_model(model: str, engine: str) -> tuple[str, Any, Any]:
    """Where a model is, its config and tokenizer. Raises ConfigError for one that no engine can take."""
    found, config = read_config(model)
    if found.gguf_file:
        raise ConfigError(
            f"model {model!r} is a GGUF file, which {engine} does not read; name a directory, or the hub's "
            "name, of the same weights",
            arguments=["model"],
        )
    tokenizer = load_tokenizer(found, config.get_text_config().vocab_size)
    if not tokenizer.chat_template:
        raise ConfigError(
            f"model {model!r} has no chat template, without which {engine} cannot write prompts; give its "
            "tokenizer one",
            arguments=["model"],
        )
    place = Path(found.place).expanduser()
    return str(place.absolute()) if place.is_dir() else found.place, config, tokenizer


def _problems(domains: Sequence[Domain], settings: RlSettings) -> tuple[list[Problem], list[Problem]]:
    """Those that the run trained on, in its order, and the held-out ones."""
    tasks = {domain.task.name: domain.task for domain in domains}
    rows = training_rows(domains, settings.all_prompts)
    training = [tasks[name].problem(n) for name, n in zip(rows["task"], rows["index"], strict=True)]
    indices = range(HELD_OUT, HELD_OUT + settings.held_out)
    return training, [task.problem(index) for task in tasks.values() for index in indices]


def _lines(problems: Iterable[Problem]) -> str:
    """A row for each problem, with what any of the engines looks for."""
    return "".join(
        json.dumps(
            {
                "id": f"{one.task}/{one.index}",
                "prompt": [dict(message) for message in one.messages],
                "label": one.answer,
                "metadata": {"task": one.task, "index": one.index},
                "data_source": one.task,
                "env_class": ENV_CLASS,
                "reward_spec": {"method": "rule", "ground_truth": one.answer},
            },
            ensure_ascii=False,
        )
        + "\n"
        for one in problems
    )


def _readme(run_dir: Path, engine: str, domains: Sequence[Domain]) -> str:
    tasks = "\n".join(f"- `{domain.task.name}`, KL {domain.kl:g}" for domain in domains)
    lacks = "\n".join(f"- {lack}" for lack in LACKS[engine])
    return (
        f"# {run_dir.name}, for {engine}\n\nProblems of\n\n{tasks}\n\nin `{TRAIN_FILE}` and "
        f"`{HELD_OUT_FILE}`. `bash launch.sh` starts the training; its first lines say what it needs. "
        "Every machine that scores replies needs fulmen, and files of tasks at the same place.\n\n"
        f"What {engine} does otherwise than "
        f"`fulmen rl`:\n\n{lacks}\n"
    )
