"""Which layers of a model see all of the past, by its config, and how far the others see."""

from typing import Any


def layer_windows(config: Any) -> list[int | None]:
    """For each layer the number of tokens that its queries see; None: all that the model's context holds."""
    kinds, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
    # Some configs name a window that no text of theirs fills (Phi-3.5).
    context = getattr(config, "max_position_embeddings", None)
    if window is not None and context is not None and window >= context:
        window = None
    if not kinds:
        return [window] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]


def full_layers(config: Any) -> list[int]:
    """Layers whose attention sees all of the past."""
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    windows = layer_windows(config)
    return [layer for layer, kind in enumerate(kinds) if kind == "full_attention" and windows[layer] is None]
