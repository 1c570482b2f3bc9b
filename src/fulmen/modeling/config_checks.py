"""What a model's config and tokenizer must have in common with each other, looked at before the weights."""

import logging
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from typing import Any

from jinja2 import TemplateSyntaxError
from transformers import AutoConfig, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from fulmen.errors import CheckpointError, one_line

# Read by tokenizers to see what they make of a text.
PROBE = "Once, in 1984: naïve\n\tcode(x) → 漢字"
SIZES = ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size", "head_dim")
ROPE_NUMBERS = (
    *("rope_theta", "factor", "attention_factor", "beta_fast", "beta_slow"),
    *("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
)
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")

log = logging.getLogger(__name__)


def read_own_config(place: str) -> PreTrainedConfig:
    """The config of a directory or hub model, by Transformers' own classes.

    Raises CheckpointError: Transformers refuses its values, or they contradict each other.
    """
    try:
        config = AutoConfig.from_pretrained(place, trust_remote_code=False)
    except Exception as error:
        raise CheckpointError(
            f"{place} has no readable config.json ({one_line(error)}); fix it, or get it anew"
        ) from error
    require_sound_config(config, place)
    return config


def require_sound_config(config: PreTrainedConfig, name: str) -> None:
    """Raise CheckpointError that names the first values of a config that contradict each other."""
    text: Any = config.get_text_config()
    if not isinstance(text, PreTrainedConfig):
        raise CheckpointError(f"{name}: text_config={text!r} is no config; fix config.json")
    heads = getattr(text, "num_attention_heads", None)
    groups = getattr(text, "num_key_value_heads", heads)
    if heads is not None and (not groups or heads % groups):
        raise CheckpointError(
            f"{name}: num_attention_heads={heads} is no multiple of num_key_value_heads={groups}; "
            "fix config.json"
        )
    for key in SIZES:
        if isinstance(size := getattr(text, key, None), int) and size < 1:
            raise CheckpointError(f"{name}: {key}={size} cannot be; fix config.json")
    if (act := getattr(text, "hidden_act", None)) is not None and act not in ACT2FN:
        raise CheckpointError(f"{name}: hidden_act={act!r} is not known to Transformers; fix config.json")
    window = getattr(text, "sliding_window", None)
    if not isinstance(window, int | None):
        raise CheckpointError(f"{name}: sliding_window={window!r} is no number; fix config.json")
    _require_known_rope(text, name)
    for key in SPECIAL_IDS:
        value = getattr(text, key, None)
        for token_id in value if isinstance(value, list) else [value]:
            if token_id is not None and token_id >= text.vocab_size:
                raise CheckpointError(
                    f"{name}: {key}={token_id} is not in the vocabulary of {text.vocab_size}; fix config.json"
                )


def _require_known_rope(config: Any, name: str) -> None:
    """Kinds of layers may have rotary tables of their own."""
    values = getattr(config, "rope_parameters", None) or {}
    for kind in {"full_attention", *(getattr(config, "layer_types", None) or ())} & values.keys():
        if not isinstance(values[kind], dict):
            raise CheckpointError(
                f"{name}: rope_parameters has {kind}={values[kind]!r}, which is no table; fix config.json"
            )
    for one in (values, *(part for part in values.values() if isinstance(part, dict))):
        kind = one.get("rope_type", "default")
        if kind not in ("default", *ROPE_INIT_FUNCTIONS):
            known = ", ".join(["default", *sorted(ROPE_INIT_FUNCTIONS)])
            raise CheckpointError(
                f"{name}: rope_parameters has rope_type={kind!r}, which Transformers does not know; fix "
                f"config.json to say one of {known}"
            )
        for key in ROPE_NUMBERS:
            if isinstance(value := one.get(key), str):
                raise CheckpointError(
                    f"{name}: rope_parameters has {key}={value!r}, which is no number; fix config.json"
                )


def require_tokens_fit(tokenizer: Any, vocab_size: int, name: str) -> None:
    """Raise CheckpointError if text becomes a token that the model has no embedding for.

    Special tokens beyond the embedding that no plain text and no chat becomes are only said: many tokenizers
    have a default of their class.
    """
    beyond = {token_id: token for token, token_id in tokenizer.get_vocab().items() if token_id >= vocab_size}
    if not beyond:
        return
    used = {token_id for ids in _probes(tokenizer) for token_id in ids}
    if met := sorted(beyond.keys() - (set(tokenizer.all_special_ids) - used)):
        raise CheckpointError(
            f"{name}: its tokenizer's token {beyond[met[-1]]!r} is {met[-1]}, its embedding ends at "
            f"{vocab_size - 1}; put the right tokenizer there, or resize the embedding"
        )
    tokens = ", ".join(map(repr, beyond.values()))
    _say_once(f"{name}: its tokenizer's {tokens} have no embedding; text with them cannot be read")


def require_sound_templates(tokenizer: Any, name: str) -> None:
    """Raise CheckpointError if a chat template is not written as Jinja is; what it says is not looked at."""
    for template in _templates(tokenizer):
        try:
            _chat(tokenizer, template)
        except TemplateSyntaxError as error:
            raise CheckpointError(
                f"{name}: line {error.lineno} of its chat template is no Jinja ({one_line(error)}); "
                "fix or remove it"
            ) from error


@cache
def _say_once(text: str) -> None:
    log.warning(text)


def _probes(tokenizer: Any) -> Iterator[list[int]]:
    """The ids of a text, and of a chat by each template."""
    yield tokenizer(PROBE).input_ids
    for template in _templates(tokenizer):
        with suppress(TemplateSyntaxError):
            yield tokenizer(_chat(tokenizer, template), add_special_tokens=False).input_ids


def _templates(tokenizer: Any) -> list[str]:
    templates = tokenizer.chat_template or {}
    return list(templates.values()) if isinstance(templates, dict) else [templates]


def _chat(tokenizer: Any, template: str) -> str:
    """A chat by a template; "" where it refuses this one, which is its right. Raises TemplateSyntaxError."""
    messages = [{"role": "user", "content": PROBE}]
    try:
        return tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True
        )
    except TemplateSyntaxError:
        raise
    except Exception:
        return ""
