"""A model that answers problems of tasks, by a rollout engine."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from fulmen.modeling.checkpoint import load_dense, load_tokenizer
from fulmen.modeling.families import accelerate_model, has_dsa
from fulmen.modeling.rollouts import RolloutEngine, Sampling
from fulmen.pipeline.devices import move
from fulmen.pipeline.load import load_converted_model
from fulmen.pipeline.model_config import read_config
from fulmen.tasks.base import Problem, Task
from fulmen.training.prompts import ends_of, pad_of
from fulmen.training.rl.episodes import play, reply_text
from fulmen.training.rl.generate_engine import GenerateRollouts

# Replies that are written together.
AT_ONCE = 64


@dataclass(frozen=True)
class Answerer:
    """A model with its tokenizer and engine."""

    engine: RolloutEngine
    tokenizer: Any

    def replies(self, task: Task, problems: Sequence[Problem], sampling: Sampling) -> list[list[str]]:
        """The replies to each problem of a task, as text."""
        tasks = {problem.task: task for problem in problems}
        rollouts = play(self.engine, self.tokenizer, tasks, problems, sampling)
        found: list[list[str]] = [[] for _ in problems]
        for rollout in rollouts:
            found[rollout.prompt].append(reply_text(self.tokenizer, rollout))
        return found


# Opens a model directory as what answers.
OpenAnswerer = Callable[[Path, torch.device], Answerer]


def open_model(place: str | Path, device: torch.device) -> tuple[PreTrainedModel, Any]:
    """A model, dense or converted, in eval mode, and its tokenizer. Raises as reading one does."""
    found, config = read_config(place)
    tokenizer = load_tokenizer(found, config.get_text_config().vocab_size)
    if has_dsa(config):
        return load_converted_model(place, device), tokenizer
    return move(load_dense(str(place))[0].eval(), device), tokenizer


def generate_answerer(place: Path, device: torch.device) -> Answerer:
    """A model that answers by Transformers' `generate`."""
    model, tokenizer = open_model(place, device)
    if has_dsa(model.config):
        accelerate_model(model)
    engine = GenerateRollouts(model, ends_of(model, tokenizer), pad_of(model, tokenizer), AT_ONCE)
    return Answerer(engine, tokenizer)
