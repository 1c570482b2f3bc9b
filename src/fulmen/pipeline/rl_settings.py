"""What `fulmen rl` is asked to do, checked before anything is loaded."""

import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fulmen.config import require_positive_int
from fulmen.errors import ConfigError
from fulmen.pipeline.arguments import flag_argument, number_argument, refused
from fulmen.pipeline.settings import AUTO_DEVICE, require_seed
from fulmen.tasks.base import Task
from fulmen.tasks.own import given_task

if TYPE_CHECKING:
    import torch

ROLLOUTS = ("generate", "vllm")
DEFAULT_KL, DEFAULT_RANK = 1e-3, 16
COUNTS = ("steps", "prompts", "group", "updates", "micro_batch", "max_new_tokens", "save_every", "n_rows")
RATES = (
    *("learning_rate", "indexer_learning_rate", "temperature", "clip_low", "clip_high", "off_policy"),
    "cut_weight",
)
FLAGS = ("checkpointing", "bf16")
# Beside a trained model, what the run was asked for.
RL_SETTINGS_FILE = "rl-settings.json"
_KL = re.compile(r"(?<=[:,])\s*kl\s*=([^,]*),?")


@dataclass(frozen=True)
class AskedTask:
    """A task by its name and parameters, or as an object; and the strength of the KL on its replies."""

    task: str | Task
    kl: float

    @property
    def label(self) -> str:
        """For records."""
        return self.task if isinstance(self.task, str) else self.task.name

    def to_dict(self) -> dict[str, Any]:
        """For a file: its name, whether that makes it again, and the KL."""
        return {"task": self.label, "is_named": isinstance(self.task, str), "kl": self.kl}


@dataclass(frozen=True)
class RlRunSettings:
    """One run of reinforcement learning.

    Attributes:
        model: a model directory, dense or converted, a hub name, a GGUF file or "smollm2-135m".
        out: directory to write.
        tasks: what is rewarded.
        rollouts: one of ROLLOUTS, what writes the replies.
        memory_gib: of vLLM's cache; None: what it needs.
        overwrite: replace a model directory at `out`.
        device: where to compute, as torch names it, or AUTO_DEVICE.
        options: fields of `fulmen.training.rl.settings.RlSettings`.
    """

    model: str
    out: Path
    tasks: tuple[AskedTask, ...]
    rollouts: str = "generate"
    memory_gib: float | None = None
    overwrite: bool = False
    device: "str | torch.device" = AUTO_DEVICE
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.rollouts not in ROLLOUTS:
            raise refused("rollouts", self.rollouts, f"choose from {', '.join(ROLLOUTS)}")
        if self.memory_gib is not None and not number_argument("memory_gib", self.memory_gib) > 0:
            raise refused("memory_gib", self.memory_gib, "use a size in GiB above 0")
        self._check_numbers()
        _require_packages(self.options.get("report_to", "none"))

    def _check_numbers(self) -> None:
        for name in (*COUNTS, "lora"):
            if (value := self.options.get(name)) is not None:
                require_positive_int(name, value)
        for name in ("top_k", "held_out"):
            value = self.options.get(name, 0)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise refused(name, value, "use an integer of 0 or more")
        for name in RATES:
            if (value := self.options.get(name)) is not None and not number_argument(name, value) > 0:
                raise refused(name, value, "use a number above 0")
        number_argument("top_p", self.options.get("top_p", 1.0), "a share above 0, at most 1")
        for name in FLAGS:
            flag_argument(name, self.options.get(name, False))
        require_seed(self.options.get("seed", 0))


def tasks_argument(tasks: object, kl: object) -> tuple[AskedTask, ...]:
    """Tasks as "NAME", "NAME:key=value,kl=0.01", functions, objects or environments. Raises ConfigError.

    kl: strength for those that do not say one.
    """
    given = [tasks] if isinstance(tasks, str) or not isinstance(tasks, Sequence) else tasks
    if not given:
        raise refused("tasks", tasks, "name at least one task, as 'spell_backward:max_word_len=5'")
    asked = tuple(_asked(one, _strength(kl)) for one in given)
    names = [one.label for one in asked]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"task {twice[0]!r} is named twice; name it once", arguments=["tasks"])
    return asked


def lora_argument(lora: object, full: object) -> int | None:
    """The rank of adapters; None where all weights are trained. Raises ConfigError."""
    if not flag_argument("full", full):
        rank = DEFAULT_RANK if lora is None else lora
        require_positive_int("lora", rank)
        return rank  # type: ignore[return-value]
    if lora is not None:
        raise ConfigError("full trains all weights, lora a few; give one of them", arguments=["full", "lora"])
    return None


def _asked(task: object, kl: float) -> AskedTask:
    if not isinstance(task, str):
        return AskedTask(given_task(task), kl)
    own = _KL.findall(task)
    if len(own) > 1:
        raise ConfigError(f"task {task!r} has kl twice; leave one out", arguments=["tasks"])
    return AskedTask(_KL.sub("", task).strip(" ,:"), _strength(own[-1].strip()) if own else kl)


def _strength(kl: object) -> float:
    try:
        value = number_argument("kl", float(kl) if isinstance(kl, str) else kl)
    except ValueError:
        value = -1.0
    if value < 0:
        raise refused("kl", kl, "use a strength of 0 or more, as 0.001")
    return value


def _require_packages(report_to: str) -> None:
    for package in ("trl", "peft"):
        if importlib.util.find_spec(package) is None:
            raise ConfigError(f"reinforcement learning needs the package {package}; install fulmen[rl]")
    if report_to not in ("none", "tensorboard", "wandb"):
        raise refused("report_to", report_to, "choose from none, tensorboard, wandb")
    if report_to != "none" and importlib.util.find_spec(report_to) is None:
        raise ConfigError(f"report_to={report_to!r} needs a package: pip install {report_to}, or use none")
