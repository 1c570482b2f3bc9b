"""A source's generation config, made one that Transformers saves and a DSA model's `generate` takes.

What goes is said; greedy stays greedy, and the values that a server samples by stay where they mean sampling.
"""

import json
import logging
import re
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

from fulmen.errors import CheckpointError, one_line
from fulmen.modeling.weights import local_file, quiet_transformers

GENERATION_FILE = "generation_config.json"
_CACHE = "such a cache has no room for index keys"
_NOT_IN_FILES = "it cannot be set in a file"
_GONE = "Transformers runs this decoding by code from the hub only"
_NO_DRAFTS = "the model has no parts that draft tokens"
# With these `generate` of a DSA model, or of any model, always fails; some mean nothing without the others.
UNUSABLE = {
    "cache_implementation": _CACHE,
    "cache_config": _CACHE,
    "max_cache_len": _CACHE,
    "compile_config": _NOT_IN_FILES,
    "continuous_batching_config": _NOT_IN_FILES,
    "penalty_alpha": _GONE,
    "dola_layers": _GONE,
    "num_beam_groups": _GONE,
    "diversity_penalty": _GONE,
    "constraints": _GONE,
    "force_words_ids": _GONE,
    "low_memory": _GONE,
    "assistant_early_exit": _NO_DRAFTS,
    "is_assistant": _NO_DRAFTS,
    "use_mtp": _NO_DRAFTS,
}
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
AT_LEAST_ONE = ("max_length", "prefill_chunk_size")
NUMBERS = (
    *SAMPLING,
    *AT_LEAST_ONE,
    *("max_new_tokens", "min_length", "min_new_tokens", "max_time", "num_beams", "num_return_sequences"),
    *("repetition_penalty", "length_penalty", "no_repeat_ngram_size", "guidance_scale"),
)


log = logging.getLogger(__name__)


def read_generation_config(place: str, vocab_size: int) -> GenerationConfig | None:
    """The fixed generation config of a directory or hub model; None if it has no file of it.

    Raises CheckpointError: no JSON, or values that Transformers refuses to load.
    """
    file = local_file(place, GENERATION_FILE)
    if file is None:
        return None
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _refused(place, f"no JSON: {one_line(error)}") from error
    if not isinstance(values, dict):
        raise _refused(place, "no JSON object")
    return fixed_generation_config(values, place, vocab_size)


def with_generation_settings(
    place: str, vocab_size: int, load: Callable[..., PreTrainedModel]
) -> PreTrainedModel:
    """What `load(generation_config=...)` makes, with the settings of `place` that can be used.

    Raises CheckpointError as `read_generation_config`, before anything is loaded.
    """
    settings = read_generation_config(place, vocab_size)
    model = load(generation_config=settings)
    if settings is None:
        fix_generation_config(model, place)
    return model


def fix_generation_config(model: PreTrainedModel, name: str) -> None:
    """The same for a model whose settings come from its config.json or from a header."""
    values = model.generation_config.to_diff_dict()
    model.generation_config = fixed_generation_config(values, name, model.config.get_text_config().vocab_size)


def fixed_generation_config(values: Mapping[str, Any], name: str, vocab_size: int) -> GenerationConfig:
    """Settings without those that cannot be used; logs a line of those. Raises CheckpointError as above."""
    for key in NUMBERS:
        if not isinstance(values.get(key), Real | None):
            raise _refused(name, f"{key}={values[key]!r} is no number")
    reasons = _unusable(values, vocab_size)
    kept = {key: value for key, value in values.items() if key not in reasons}
    changes = [
        f"{key}={values[key]!r} is left out ({why})"
        for key, why in reasons.items()
        # Of defaults that old files spell out nothing is to be said.
        if (values[key] and (key, values[key]) != ("num_beam_groups", 1)) or key in AT_LEAST_ONE
    ]
    changes += _settle_sampling(kept, name)
    # What is still amiss has no effect; Transformers only refuses to save it.
    changes += [f"{key}={kept.pop(key)!r} is left out (it has no effect)" for key in _idle(_made(kept, name))]
    made = _made(kept, name)
    if idle := _idle(made):
        raise _refused(name, f"{', '.join(idle)} cannot be")
    if changes:
        log.warning("%s: of its generation settings %s", name, "; ".join(changes))
    return made


def _unusable(values: Mapping[str, Any], vocab_size: int) -> dict[str, str]:
    """Keys that must go, each with the reason."""
    reasons = {key: why for key, why in UNUSABLE.items() if key in values}
    for key in AT_LEAST_ONE:
        if values.get(key) is not None and values[key] < 1:
            reasons[key] = "it must be 1 or more"
    pad = values.get("pad_token_id")
    if isinstance(pad, int) and not 0 <= pad < vocab_size:
        reasons["pad_token_id"] = "it is not in the vocabulary"
    return reasons


def _settle_sampling(values: dict[str, Any], name: str) -> list[str]:
    """Say plainly in `values` whether to sample; Transformers saves no settings of it without `do_sample`.

    Servers sample by such settings, so they are not dropped where nobody asked for greedy decoding.
    """
    asked = [key for key in SAMPLING if values.get(key) is not None]
    temperature = values.get("temperature")
    if temperature is not None and temperature <= 0:
        for key in (*asked, "do_sample"):
            values.pop(key, None)
        return [f"temperature={temperature} becomes greedy decoding"]
    if values.get("do_sample") is None and set(asked).intersection(_idle(_made(values, name))):
        values["do_sample"] = True
        return [f"{', '.join(asked)} without do_sample turn sampling on"]
    return []


def _idle(config: GenerationConfig) -> list[str]:
    """Keys that Transformers refuses to save because they do nothing beside the others."""
    try:
        with quiet_transformers():
            config.validate(strict=True)
    except ValueError as error:
        return re.findall(r"^- `(\w+)`", str(error), re.MULTILINE) or [one_line(error)]
    return []


def _made(values: Mapping[str, Any], name: str) -> GenerationConfig:
    try:
        with quiet_transformers():
            return GenerationConfig.from_dict(dict(values))
    except Exception as error:
        raise _refused(name, one_line(error)) from error


def _refused(name: str, reason: str) -> CheckpointError:
    return CheckpointError(f"{name} has an unusable {GENERATION_FILE} ({reason}); fix or remove it")
