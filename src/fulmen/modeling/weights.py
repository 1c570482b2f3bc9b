"""The weights of a model: loaded in full, or refused with the names of those that do not fit its config."""

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils.hub import cached_file

from fulmen.errors import CheckpointError, one_line
from fulmen.modeling.family import has_own_head
from fulmen.modeling.weight_files import INDEX_FILE, WEIGHTS_FILE, names_in, weight_files
from fulmen.ops.half_products import hasten_half_products

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
# Tables that old checkpoints hold and every model makes itself.
COMPUTED = re.compile(r"(^|\.)(rotary_emb\.(inv_freq|cos_cached|sin_cached)|position_ids)$")
NAMES_SHOWN = 3

log = logging.getLogger(__name__)


class _Faults(NamedTuple):
    """Weights that do not fit: not in the file, not in the model, of another shape (with both shapes)."""

    missing: list[str]
    unexpected: list[str]
    mismatched: list[tuple[str, Any, Any]]


def load_all_weights(
    place: str, model_class: Any = AutoModelForCausalLM, *, left_out: str = r"(?!)", **options: Any
) -> PreTrainedModel:
    """Load a model all of whose weights come from the file, and all of the file's weights are in it.

    A head of its own survives where the config calls it tied: the model's config is then untied.

    Args:
        place: a directory or hub name.
        model_class: an auto class or model class.
        left_out: pattern of names that `model_class` leaves in the file on purpose.
        options: for `from_pretrained`.

    Raises CheckpointError: the weights cannot be read, or do not fit the config.
    """
    try:
        with quiet_transformers():
            loaded: Any = model_class.from_pretrained(
                place,
                output_loading_info=True,
                # We look ourselves, and name the weights: Transformers points to a report that nobody sees.
                ignore_mismatched_sizes=True,
                # Never a pickle, which could run code.
                use_safetensors=True,
                trust_remote_code=False,
                **options,
            )
    except Exception as error:
        raise unreadable(place, one_line(error)) from error
    model, info = loaded
    if getattr(model, "_hf_peft_config_loaded", False):
        raise CheckpointError(f"{place} holds an adapter beside the weights; merge it into them first")
    known = _known_extras(place, model.config, left_out)
    _require_fit(
        place,
        _Faults(
            sorted(info["missing_keys"]),
            sorted(key for key in info["unexpected_keys"] if not known.search(key)),
            sorted(info["mismatched_keys"]),
        ),
    )
    settle_loaded(model)
    return model


def settle_loaded(model: PreTrainedModel) -> None:
    """Let a loaded model's config say what its weights are, its attention do what the config says, and its
    products be taken at this machine's speed."""
    hasten_half_products(model.dtype)
    if model.config.tie_word_embeddings and has_own_head(model):
        model.config.tie_word_embeddings = False
    keep_caps(model)


def keep_caps(model: PreTrainedModel) -> None:
    """Let a stock model whose logits are capped attend eagerly: Transformers' SDPA leaves the caps out."""
    capped = getattr(model.config, "attn_logit_softcapping", None) is not None
    if capped and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation("eager")


def require_held(
    place: str,
    config: PreTrainedConfig,
    wanted: Mapping[str, tuple[int, ...]],
    held: Mapping[str, tuple[int, ...]],
    left_out: str = r"(?!)",
) -> None:
    """Hold the shapes of a directory's weights against those of a model, before any is read.

    A head that is the embedding may be stored under either name, or twice.

    Raises CheckpointError as `load_all_weights` for those that do not fit.
    """
    known = _known_extras(place, config, left_out)
    both = {HEAD, EMBEDDING} if config.tie_word_embeddings else set()
    if len(absent := both - held.keys()) == 1:
        wanted = {name: shape for name, shape in wanted.items() if name not in absent}
    extra = held.keys() - wanted.keys() - both
    _require_fit(
        place,
        _Faults(
            sorted(wanted.keys() - held.keys()),
            sorted(name for name in extra if not known.search(name)),
            _mismatched(wanted, held),
        ),
    )


def require_shapes(
    place: str, wanted: Mapping[str, tuple[int, ...]], held: Mapping[str, tuple[int, ...]]
) -> None:
    """As `require_held`, of the weights alone that both sides have."""
    _require_fit(place, _Faults([], [], _mismatched(wanted, held)))


def _mismatched(
    wanted: Mapping[str, tuple[int, ...]], held: Mapping[str, tuple[int, ...]]
) -> list[tuple[str, Any, Any]]:
    both = sorted(wanted.keys() & held.keys())
    return [(name, held[name], wanted[name]) for name in both if held[name] != wanted[name]]


def local_file(place: str, file_name: str, **options: Any) -> Path | None:
    """A file of a directory, or of a hub model, which is fetched; None if there is none of that name."""
    if Path(place).is_dir():
        file = Path(place, file_name)
        return file if file.is_file() else None
    found = cached_file(
        place,
        file_name,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **options,
    )
    return Path(found) if found else None


def unreadable(name: object, reason: str) -> CheckpointError:
    """The error for weights that cannot be read."""
    return CheckpointError(f"{name} has unreadable weights ({reason}); get it anew")


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No report of Transformers on the console; what it would report is looked at by the caller."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)


def _known_extras(place: str, config: PreTrainedConfig, left_out: str) -> re.Pattern[str]:
    """Names that may be in the file and not in the model; says what of them is lost."""
    patterns = [COMPUTED.pattern, left_out]
    last = getattr(config, "num_hidden_layers", 0)
    more = range(last, last + (getattr(config, "num_nextn_predict_layers", 0) or 0))
    # What such a layer has and no other: the projection of the last hidden state and the next embedding.
    found = (re.fullmatch(r"model\.layers\.(\d+)\.eh_proj\.weight", key) for key in _names_at(place))
    layers = {int(match[1]) for match in found if match}
    if dropped := sorted(layers.intersection(more)):
        log.warning(
            "%s: layer %s predicts further tokens (MTP); the model runs without it, as in Transformers",
            place,
            ", ".join(map(str, dropped)),
        )
        patterns += [rf"^model\.layers\.{layer}\." for layer in dropped]
    return re.compile("|".join(f"({pattern})" for pattern in patterns))


def _names_at(place: str) -> list[str]:
    """Names of the weights in a directory, or in the local copy of a hub model."""
    here = (local_file(place, file, local_files_only=True) for file in (WEIGHTS_FILE, INDEX_FILE))
    folder = next((file.parent for file in here if file), None)
    return [key for file in weight_files(folder) for key in names_in(file)] if folder else []


def _require_fit(name: str, faults: _Faults) -> None:
    """Raise CheckpointError that names the first weights that do not fit, and the remedy."""
    if not any(faults):
        return
    if faults.missing == [HEAD] and not faults.unexpected and not faults.mismatched:
        raise CheckpointError(
            f"{name} lacks 1 weights, the first {HEAD}; set tie_word_embeddings to true in config.json "
            "if the embedding is the head, else get it anew"
        )
    said = []
    if faults.mismatched:
        key, held, wanted = faults.mismatched[0]
        said.append(
            f"holds {len(faults.mismatched)} weights of another shape than config.json says, "
            f"the first {key}: {list(held)}, not {list(wanted)}"
        )
    if faults.unexpected:
        said.append(
            f"holds {len(faults.unexpected)} weights that config.json does not ask for, "
            f"as {', '.join(faults.unexpected[:NAMES_SHOWN])}"
        )
    if faults.missing:
        said.append(f"lacks {len(faults.missing)} weights, the first {faults.missing[0]}")
    remedy = "get it anew"
    if faults.mismatched or faults.unexpected:
        remedy = "fix config.json to say what the weights are, or get the model anew"
    raise CheckpointError(f"{name} {' and '.join(said)}; {remedy}")
