"""The warm-up of a conversion, or of a model that was only inherited; done once in a run."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from transformers import PreTrainedModel

from fulmen.data import TokenSequence
from fulmen.evaluation.variants import indexer_state
from fulmen.pipeline.reporter import Reporter, TrainingView
from fulmen.pipeline.run_dir import RunDir
from fulmen.training.processes import is_main_process
from fulmen.training.warmup.run import warm_up
from fulmen.training.warmup.settings import WarmupSettings

WARMUP_DIR = "warmup"


def warmup_stage(
    model: PreTrainedModel,
    training: Sequence[TokenSequence],
    validation: Sequence[TokenSequence],
    settings: WarmupSettings,
    run: RunDir,
    reporter: Reporter,
) -> dict[str, Any]:
    """Train the indexers in place; return what was measured. Raises what `warm_up` does."""
    if (done := run.load_done("warmup")) is not None:
        indexers, result = done
        model.load_state_dict(indexers, strict=False)
        return dict(result)
    with reporter.stage("Warm-up"):
        view = TrainingView(reporter)
        found = warm_up(model, training, validation, run.path / WARMUP_DIR, settings, view.step, view.part)
    reporter.note(
        f"Warm-up: validation loss {found.loss_before:.4f} -> {found.loss_after:.4f} "
        f"(step {found.best_step} of {found.last_step}, {found.seconds:.0f} s)"
    )
    if is_main_process():
        run.save_record("warmup", asdict(found))
        run.save_stage("warmup", indexer_state(model))
    return asdict(found)
