"""What a recipe's stages call; one place, so that a program can put something of its own in theirs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from fulmen.errors import ConfigError
from fulmen.pipeline.answers import OpenAnswerer, generate_answerer
from fulmen.pipeline.api import convert
from fulmen.pipeline.api_rl import rl
from fulmen.pipeline.lessons import Lesson
from fulmen.pipeline.reporter import Reporter
from fulmen.pipeline.sft import run_sft
from fulmen.training.sft.settings import SftSettings


def convert_stage(
    source: str, out: Path, options: Mapping[str, Any], seed: int, device: torch.device, reporter: Reporter
) -> None:
    """`fulmen.convert` with the recipe's options."""
    convert(source, out=out, seed=seed, device=device, reporter=reporter, **options)


def sft_stage(
    source: str,
    lessons: Sequence[Lesson],
    out: Path,
    options: Mapping[str, Any],
    seed: int,
    device: torch.device,
    reporter: Reporter,
) -> None:
    """Supervised fine-tuning on lessons."""
    run_sft(source, lessons, out, SftSettings(**options, seed=seed), device, reporter)


def rl_stage(
    source: str,
    tasks: Sequence[str],
    out: Path,
    options: Mapping[str, Any],
    seed: int,
    device: torch.device,
    reporter: Reporter,
) -> None:
    """`fulmen.rl` on tasks, each with its strength of the KL."""
    rl(source, tasks=list(tasks), out=out, seed=seed, device=device, reporter=reporter, **options)


def require_rl() -> None:
    """Raise ConfigError where reinforcement learning is not installed."""
    if find_spec("trl") is None:
        raise ConfigError("this recipe needs reinforcement learning; run: pip install 'fulmen[rl]'")


@dataclass(frozen=True)
class RecipeStages:
    """The functions that do a recipe's work.

    Attributes:
        require: raises what stands against the run, before any work.
        convert, sft, rl: write a model directory, whole or not at all.
        answerer: opens a model that answers problems.
    """

    require: Callable[[], None] = require_rl
    convert: Callable[..., None] = convert_stage
    sft: Callable[..., None] = sft_stage
    rl: Callable[..., None] = rl_stage
    answerer: OpenAnswerer = generate_answerer
