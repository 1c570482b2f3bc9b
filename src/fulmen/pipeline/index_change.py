"""Another index for a model that is converted already: a coarse level added or taken away."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from fulmen.config import DsaConfig
from fulmen.errors import AlreadyConvertedError, ConfigError
from fulmen.evaluation.variants import indexer_state
from fulmen.files import write_file
from fulmen.modeling.checkpoint import CARD_FILE, require_free_output, require_savable, save_converted
from fulmen.modeling.families import dsa_family_for, dsa_of, has_dsa
from fulmen.modeling.index_shape import in_levels
from fulmen.modeling.lengths import context_of
from fulmen.pipeline.arguments import parse_duration
from fulmen.pipeline.coarse_stage import fit_coarse
from fulmen.pipeline.conversion import Conversion
from fulmen.pipeline.devices import training_device
from fulmen.pipeline.load import load_converted_model, load_converted_tokenizer
from fulmen.pipeline.model_config import read_config, require_language_model_alone
from fulmen.pipeline.reporter import Reporter
from fulmen.pipeline.settings import DEFAULT_BUDGET, ConvertSettings
from fulmen.pipeline.texts import calibration_texts, draw_longest, lengths_to_try, read_corpus
from fulmen.pipeline.train import RECORD_FILE, STAGES_DIR, record_of

INHERITED = f"{STAGES_DIR}/inherit.safetensors"
# What only a conversion from the beginning can change.
CONVERSION_ONLY = {
    **dict.fromkeys(("topk", "steps", "sparse_steps", "sparse_budget_s", "index_heads", "index_head_dim")),
    "budget_s": parse_duration(DEFAULT_BUDGET),
    **dict.fromkeys(("stages", "by_layers")),
    "dtype": "auto",
}


def is_index_change(settings: ConvertSettings) -> bool:
    """Whether the source is converted already and another index is asked for."""
    if settings.index is None or not isinstance(settings.source, str):
        return False
    return Path(settings.source).is_dir() and has_dsa(read_config(settings.source)[1])


def run_index_change(settings: ConvertSettings, reporter: Reporter) -> Conversion:
    """Write the source with the index that is asked for. Raises as `run_conversion`."""
    source, out = str(settings.source), settings.out.expanduser().absolute()
    config = read_config(source)[1]
    require_language_model_alone(source, "a change of the index")
    dsa = _changed(config, settings)
    record = record_of(Path(source))
    require_free_output(out, overwrite=settings.overwrite)
    with reporter.stage("Read data"):
        tokenizer = load_converted_tokenizer(source)
        corpus = read_corpus(settings.data, settings.texts)
        lengths, context = lengths_to_try(settings.length, config, dsa.topk), context_of(config)
        texts = draw_longest(
            lengths,
            lambda length: calibration_texts(corpus.calibration, tokenizer, length, context, settings.seed),
            reporter,
        )
    reporter.note(f"Loading {source}")
    with reporter.stage("Load"):
        model = load_converted_model(source, training_device(settings.device))
        require_savable(model, tokenizer, out)
    dsa_family_for(config).set_coarse(model, dsa)
    if dsa.coarse_head_dim:
        fit_coarse(model, torch.stack([text.input_ids for text in texts]).to(model.device), reporter)
    record = {**record, "dsa": dsa.to_dict()}
    with reporter.stage("Save"):
        _save(model, tokenizer, Path(source), out, record, settings.overwrite)
    return Conversion(out, record)


def _changed(config: Any, settings: ConvertSettings) -> DsaConfig:
    """Raises ConfigError for what would change more, AlreadyConvertedError where nothing would change."""
    for name, default in CONVERSION_ONLY.items():
        if getattr(settings, name) not in (None, default):
            argument = name.removesuffix("_s")
            raise ConfigError(
                f"{argument} does not apply to a converted model, whose index alone is changed; leave it out"
            )
    dsa = dsa_of(config)
    changed = in_levels(dsa, dsa_family_for(config), config, settings.index)
    if bool(changed.coarse_head_dim) == bool(dsa.coarse_head_dim):
        raise AlreadyConvertedError(
            f"{settings.source} has a {settings.index} index already; use it as it is"
        )
    return changed


def _save(
    model: PreTrainedModel, tokenizer: Any, source: Path, out: Path, record: dict[str, Any], overwrite: bool
) -> None:
    """All files of the source; its inherited indexers get the same coarse level."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
        extras = {f"{STAGES_DIR}/{path.name}": path for path in (source / STAGES_DIR).glob("*")}
        if (source / INHERITED).is_file():
            extras[INHERITED] = Path(temporary) / "inherit.safetensors"
            own = indexer_state(model)
            inherited = {name: x for name, x in load_file(source / INHERITED).items() if name in own}
            save_file(
                {name: x.cpu().contiguous() for name, x in (own | inherited).items()}, extras[INHERITED]
            )
        extras[RECORD_FILE] = Path(temporary) / RECORD_FILE
        write_file(extras[RECORD_FILE], json.dumps(record, indent=2))
        card = (source / CARD_FILE).read_text(encoding="utf-8") if (source / CARD_FILE).is_file() else ""
        save_converted(model, tokenizer, out, card, overwrite=overwrite, extras=extras)
