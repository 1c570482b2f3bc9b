"""What a GGUF file of Gemma 3 leaves to its reader: windows, the sliding layers' RoPE, the logits' scale.

llama.cpp's converter writes few of these keys, and its reader has the numbers of the models themselves.
"""

from typing import Any

from fulmen.errors import CheckpointError
from fulmen.modeling.gguf.file import GgufModel

# In the architecture's namespace, beside what every one has.
GEMMA3_KEYS = {"attention.sliding_window_pattern", "rope.freq_base_swa"}
# Norms are stored as what they multiply by, 1 + weight.
NORM_OFFSET = 1.0

_FULL, _SLIDING = "full_attention", "sliding_attention"
# Layers in a row of which the last sees all, and RoPE's base in the others, for files that do not say.
_PERIOD = 6
_SLIDING_THETA = 10000.0
# The one model (27B) whose logits are not divided by the root of a head's width is known by its layers.
_LAYERS_OF_27B = 62


def gemma3_values(model: GgufModel, values: dict[str, Any]) -> dict[str, Any]:
    """Values of a `Gemma3TextConfig` beside, or in place of, those that all architectures have.

    Args:
        values: what all have; `rope_parameters` are the full layers'.

    Raises CheckpointError for a pattern of windows that cannot be.
    """
    layers, window = values["num_hidden_layers"], model.get("attention.sliding_window", 0)
    sliding_rope = {"rope_type": "default", "rope_theta": model.get("rope.freq_base_swa", _SLIDING_THETA)}
    scalar = values["head_dim"]
    if layers == _LAYERS_OF_27B:
        scalar = values["hidden_size"] // values["num_attention_heads"]
    return {
        "sliding_window": window or None,
        "layer_types": [_SLIDING if slides else _FULL for slides in _sliding(model, layers, window)],
        "query_pre_attn_scalar": scalar,
        "rope_parameters": {_FULL: values["rope_parameters"], _SLIDING: sliding_rope},
    }


def _sliding(model: GgufModel, layers: int, window: int) -> list[bool]:
    """For each layer whether it has the window; the key holds a period, or the answers themselves."""
    if not window:
        return [False] * layers
    pattern = model.get("attention.sliding_window_pattern", _PERIOD)
    if isinstance(pattern, list):
        if len(pattern) != layers:
            raise CheckpointError(
                f"{model.path} has {model.architecture}.attention.sliding_window_pattern of {len(pattern)} "
                f"values for {layers} layers; get it anew"
            )
        return [bool(slides) for slides in pattern]
    return [pattern == 0 or layer % pattern < pattern - 1 for layer in range(layers)]
