"""Supervised fine-tuning of a model directory, dense or converted, on prompts and replies; resumable."""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fulmen.errors import ConfigError, FulmenError, one_line
from fulmen.modeling.checkpoint import require_free_output, require_savable
from fulmen.modeling.families import accelerated, has_dsa
from fulmen.pipeline.answers import open_model
from fulmen.pipeline.conversion import Conversion
from fulmen.pipeline.fingerprint import weights_fingerprint
from fulmen.pipeline.lessons import Lesson
from fulmen.pipeline.model_config import require_language_model_alone
from fulmen.pipeline.post_trained import record_before, save_post_trained
from fulmen.pipeline.reporter import Reporter, TrainingView
from fulmen.pipeline.run_dir import RunDir
from fulmen.pipeline.train import STAGES_DIR
from fulmen.training.prompts import pad_of
from fulmen.training.sft.rows import SftRow, sft_row
from fulmen.training.sft.run import LOG_FILE, SftResult, train_sft
from fulmen.training.sft.settings import SftSettings

SFT_DIR = "sft"


def run_sft(
    source: str,
    lessons: Sequence[Lesson],
    out: Path,
    settings: SftSettings,
    device: torch.device,
    reporter: Reporter,
    *,
    overwrite: bool | None = None,
) -> Conversion:
    """Train `source` on the lessons and write it to `out`, whole or not at all.

    overwrite: replaces a model directory at `out`, and an unfinished run with other settings; None: the
        caller has no such option.

    Raises every FulmenError its parts raise; ResumeError for an unfinished run with other settings.
    """
    require_free_output(out, overwrite=overwrite)
    require_language_model_alone(source, "sft")
    with reporter.stage("Load"):
        model, tokenizer = open_model(source, device)
        require_savable(model, tokenizer, out)
        rows = [_row(tokenizer, lesson) for lesson in lessons]
    record, run = record_before(source, has_dsa(model.config)), RunDir(out)
    identity = {
        **asdict(settings),
        "source": source,
        "rows": len(rows),
        "rows_digest": hashlib.sha256(repr(rows).encode()).hexdigest()[:16],
        "model_weights": weights_fingerprint(model.state_dict()),
    }
    if run.open(identity, discard_other=bool(overwrite)):
        reporter.note("Resuming an interrupted run")
    with reporter.stage("SFT"), accelerated(model):
        view = TrainingView(reporter)
        result = train_sft(model, rows, pad_of(model, tokenizer), run.path / SFT_DIR, settings, view.step)
    reporter.note(
        f"SFT on {len(rows)} replies: loss {result.loss_first:.4f} -> {result.loss_last:.4f} "
        f"({result.steps} steps, {result.seconds:.0f} s)"
    )
    record = _record(record, settings, result, len(rows))
    files = {f"{STAGES_DIR}/{LOG_FILE}": run.path / SFT_DIR / LOG_FILE}
    card = _card(result, settings, len(rows))
    save_post_trained(model, tokenizer, source, out, record, card, files, run, overwrite=bool(overwrite))
    run.remove()
    return Conversion(out, record)


def _row(tokenizer: Any, lesson: Lesson) -> SftRow:
    """Raises ConfigError for a chat that the template refuses, or that has no tokens."""
    try:
        return sft_row(tokenizer, lesson.messages, lesson.reply)
    except FulmenError:
        raise
    except Exception as error:  # whatever a template raises
        raise ConfigError(
            f"the chat template refuses {str(lesson.messages)[:60]!r} ({one_line(error)}); change that chat"
        ) from error


def _record(before: dict[str, Any], settings: SftSettings, result: SftResult, replies: int) -> dict[str, Any]:
    return {
        **before,
        "stages": [*before["stages"], "sft"],
        "stages_done": {**before.get("stages_done", {}), "sft": asdict(result)},
        "sft": {**asdict(settings), "replies": replies},
    }


def _card(result: SftResult, settings: SftSettings, replies: int) -> str:
    return (
        f"\n## Supervised fine-tuning\n\n{result.steps} steps of {settings.batch} on {replies} replies, "
        f"seed {settings.seed}: loss {result.loss_first:.4f} to {result.loss_last:.4f} nats a token.\n"
    )
