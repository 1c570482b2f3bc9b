"""A task by its name, as `spell_backward:max_word_len=5` or `python:my_tasks.py:riddles`."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

from fulmen.errors import ConfigError
from fulmen.tasks.base import Task
from fulmen.tasks.own import PREFIX, own_task
from fulmen.tasks.parameters import parse_parameters, unknown_task
from fulmen.tasks.reasoning import ReasoningTask, reasoning_names, require_usable

# fulmen's own tasks: the module with each, and the class in it, made with the spec and the parameters.
OWN: dict[str, tuple[str, str]] = {
    "code": ("fulmen.tasks.code", "CodeTask"),
    "humaneval": ("fulmen.tasks.humaneval", "HumanEvalTask"),
    "prove": ("fulmen.tasks.proofs.factory", "named_proof_task"),
    "tools": ("fulmen.tasks.tools", "ToolsTask"),
    "verify_proof": ("fulmen.tasks.proofs.factory", "named_proof_task"),
    "world": ("fulmen.tasks.worlds.task", "WorldTask"),
    "world_steps": ("fulmen.tasks.worlds.steps", "WorldStepsTask"),
}


def named(spec: str) -> Task:
    """The task of `NAME[:key=value,…]`.

    Args:
        spec: a name of `task_names()` and parameters of that task; or `python:FILE.py:NAME` or
            `python:MODULE:NAME` for one of the user's own (`fulmen.tasks.own`).

    Raises ConfigError, with names near it or the parameters there are, for what cannot be.
    """
    if not isinstance(spec, str) or not spec.strip():
        raise ConfigError(f"task {spec!r} cannot be; write NAME or NAME:key=value,key=value")
    spec = spec.strip()
    if spec.startswith(PREFIX):
        return own_task(spec)
    name, _, text = spec.partition(":")
    parameters = parse_parameters(spec, text)
    if name in OWN:
        module, made_by = OWN[name]
        make: Callable[..., Task] = getattr(import_module(module), made_by)
        return make(spec, parameters)
    require_usable(name)
    known: dict[str, Any] = dict.fromkeys(reasoning_names())
    if name not in known:
        raise unknown_task(name, task_names())
    return ReasoningTask(spec, name, parameters)


def task_names() -> list[str]:
    """All names that `named` knows: fulmen's own tasks and reasoning-gym's."""
    return sorted([*OWN, *reasoning_names()])
