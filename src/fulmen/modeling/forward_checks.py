"""What a forward pass of a DSA model cannot do, said before it begins."""

from typing import Any

from fulmen.errors import ConfigError


def require_no_attention_weights(*wanted: bool | None) -> None:
    """Raise ConfigError if `output_attentions` is true anywhere that it can be given."""
    if any(wanted):
        raise ConfigError(
            "output_attentions=True cannot be given: weights of all keys are never made; "
            "leave it out, or ask the dense model (fulmen.modeling.checkpoint.dense_view)"
        )


def require_no_dropout(config: Any, *, training: bool) -> None:
    """Raise ConfigError for an attention's dropout in training: no op has it."""
    for key in ("attention_dropout", "residual_dropout"):
        if training and (dropout := getattr(config, key, None)):
            raise ConfigError(f"{key}={dropout} is not supported in training; set it to 0 in the config")
