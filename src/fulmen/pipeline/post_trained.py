"""What the stages of post-training share: how their model was made before, and how it is written."""

import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from fulmen.modeling.checkpoint import save_converted
from fulmen.modeling.families import has_dsa
from fulmen.pipeline.model_card import conversion_card
from fulmen.pipeline.run_dir import RunDir
from fulmen.pipeline.train import RECORD_FILE, STAGES_DIR, record_of
from fulmen.version import __version__


def record_before(source: str, is_converted: bool) -> dict[str, Any]:
    """How a model was made; of a dense one, its name."""
    if is_converted:
        return record_of(Path(source).expanduser())
    versions = {"fulmen": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    return {"source": source, "stages": [], "made_with": {**versions, "python": platform.python_version()}}


def save_post_trained(
    model: PreTrainedModel,
    tokenizer: Any,
    source: str,
    out: Path,
    record: Mapping[str, Any],
    section: str,
    files: Mapping[str, Path],
    run: RunDir,
    *,
    overwrite: bool = False,
) -> None:
    """Write the model with its card, whose last part is `section`, the source's stages, and `files`."""
    run.save_record("conversion", record)
    stages = (Path(source).expanduser() / STAGES_DIR).glob("*")
    extras = {f"{STAGES_DIR}/{file.name}": file for file in stages if file.is_file()} | dict(files)
    if has_dsa(model.config):
        extras[RECORD_FILE] = run.record("conversion")
        card = conversion_card(json.loads(json.dumps(record)), model.config.model_type)
    else:
        card = f"# {record['source']}\n"
    save_converted(model, tokenizer, out, card + section, overwrite=overwrite, extras=extras)
