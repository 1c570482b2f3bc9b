"""Files of a run, made safe: what is half-written is never taken for complete, and costs nothing old."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from fulmen.errors import unwritable
from fulmen.files import atomic_write
from fulmen.modeling.weight_files import follow_umask

# Written last; a checkpoint without it was interrupted.
COMPLETE_FILE = "whole"
CHECKPOINTS = f"{PREFIX_CHECKPOINT_DIR}-*"


def log_up_to(file: Path, step: int) -> list[dict[str, Any]]:
    """The lines of a stage's log up to a step; a last line cut off by a kill is left out."""
    if not file.exists():
        return []
    rows = map(json.loads, file.read_text(encoding="utf-8").split("\n")[:-1])
    return [row for row in rows if row["step"] <= step]


def write_log(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Let a stage's log be these lines; those after them are run and logged again."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    atomic_write(file, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def is_complete_checkpoint(folder: str | Path | None) -> bool:
    """Whether a checkpoint was written to its end."""
    return folder is not None and Path(folder, COMPLETE_FILE).exists()


def last_complete_checkpoint(run_dir: Path) -> str | None:
    """The latest finished checkpoint in `run_dir`."""
    folders = [folder for folder in run_dir.glob(CHECKPOINTS) if is_complete_checkpoint(folder)]
    return str(max(folders, key=checkpoint_step)) if folders else None


def drop_unfinished_checkpoints(run_dir: Path) -> None:
    """Delete what an interrupted run left half-written. For one process, while none is saving."""
    for folder in run_dir.glob(CHECKPOINTS):
        if not is_complete_checkpoint(folder):
            shutil.rmtree(folder, ignore_errors=True)


def checkpoint_step(folder: str | Path) -> int:
    """The step in a checkpoint folder's name."""
    return int(Path(folder).name.rsplit("-", 1)[1])


class SafeCheckpoints:
    """Goes before Trainer. Needs `save_total_limit` >= 2: the old one goes when the new is complete."""

    args: Any
    state: Any
    accelerator: Any

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self.args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        try:
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
            if self.args.should_save:
                (folder / COMPLETE_FILE).touch()
                follow_umask(folder.glob("*.safetensors"), folder / COMPLETE_FILE)
        # torch.save turns a full disk into a RuntimeError.
        except (OSError, RuntimeError, SafetensorError) as error:
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)
            raise unwritable(folder, error) from error
        # No process goes on, to its end perhaps, before the checkpoint counts for all.
        self.accelerator.wait_for_everyone()
