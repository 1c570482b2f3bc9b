"""The formats of quantized checkpoints that are read, by what `quantization_config` in config.json says."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from fulmen.errors import UnsupportedModelError
from fulmen.modeling.quantization.compressed import compressed_weights
from fulmen.modeling.quantization.fp8 import fp8_weights
from fulmen.modeling.quantization.gptq import AWQ_BITS, awq_weights, gptq_weights
from fulmen.modeling.quantization.mxfp4 import mxfp4_weights
from fulmen.modeling.quantization.packed import FindPacked, PackedWeight, packed_modules
from fulmen.modeling.shards import Held

COMPRESSED_TENSORS = "compressed-tensors"
FORMATS: dict[str, FindPacked] = {
    "fp8": fp8_weights,
    COMPRESSED_TENSORS: compressed_weights,
    "awq": awq_weights,
    "gptq": gptq_weights,
    "mxfp4": mxfp4_weights,
}
READABLE_IN_WORDS = "FP8, compressed-tensors, AWQ, GPTQ or MXFP4"
# Formats that list the modules they leave alone, with the key for it. GPTQ's go by what the files hold.
LEFT_OUT_KEYS = {
    "fp8": "modules_to_not_convert",
    "awq": "modules_to_not_convert",
    "mxfp4": "modules_to_not_convert",
    COMPRESSED_TENSORS: "ignore",
}
GPTQ_BITS = (2, 4, 8)
# Scales of activations, keys and values: nothing that a weight is made of.
OTHER_SCALES = re.compile(r"\.([qkv]|prob|input|output|activation)_(scale|zero_point)(_inv)?$")


def quantization_of(config: Any) -> dict[str, Any] | None:
    """What a model's config says of a quantization; None: nothing."""
    held: Any = getattr(config, "quantization_config", None)
    return quantization_in({"quantization_config": held.to_dict() if hasattr(held, "to_dict") else held})


def quantization_in(values: Mapping[str, Any]) -> dict[str, Any] | None:
    """As `quantization_of`, of what config.json holds."""
    held = values.get("quantization_config")
    return held if isinstance(held, dict) or held is None else {"quant_method": str(held)}


def is_readable_quantization(config: Any) -> bool:
    """Whether a model is quantized in a way that can be read here."""
    settings = quantization_of(config)
    return settings is not None and _why_unreadable(settings) is None


def require_readable_quantization(settings: Mapping[str, Any], place: str) -> None:
    """Raise UnsupportedModelError for a format, or a kind of one, that cannot be read here."""
    if (reason := _why_unreadable(settings)) is not None:
        raise UnsupportedModelError(
            f"{place} is quantized ({settings.get('quant_method')}){reason}; convert the unquantized "
            f"weights, or those in {READABLE_IN_WORDS}"
        )


def _why_unreadable(settings: Mapping[str, Any]) -> str | None:
    method = settings.get("quant_method")
    if not isinstance(method, str) or method not in FORMATS:
        return ", which cannot be read here"
    reason = _REASONS.get(method, _no_reason)(settings)
    return reason and f" with {reason}"


def packed_weights(settings: Mapping[str, Any], held: Mapping[str, Held]) -> dict[str, PackedWeight]:
    """The quantized weights of files, by the names that the model has for them.

    Raises CheckpointError for parts that are missing or do not fit each other.
    """
    return FORMATS[settings["quant_method"]](packed_modules(held), settings)


def quantization_in_words(settings: Mapping[str, Any]) -> str:
    """ "fp8, 128 x 128", "compressed-tensors, int-quantized", "gptq, 4 bits"."""
    words = [str(settings.get("quant_method"))]
    if block := settings.get("weight_block_size"):
        words.append(" x ".join(map(str, block)))
    if kind := settings.get("format"):
        words.append(str(kind))
    if bits := settings.get("bits"):
        words.append(f"{bits} bits")
    return ", ".join(words)


def quantization_without(settings: Mapping[str, Any], modules: Iterable[str]) -> dict[str, Any]:
    """The settings of a model that has more modules than were quantized, which are left alone."""
    key = LEFT_OUT_KEYS.get(settings["quant_method"])
    return {**settings, key: [*(settings.get(key) or ()), *modules]} if key else dict(settings)


def lists_left_out(settings: Mapping[str, Any]) -> bool:
    """Whether the settings list modules; loaders have a list of their own where there is none."""
    key = LEFT_OUT_KEYS.get(settings["quant_method"])
    return key is None or settings.get(key) is not None


def _no_reason(settings: Mapping[str, Any]) -> str | None:
    return None


def _awq_reason(settings: Mapping[str, Any]) -> str | None:
    if settings.get("bits", settings.get("w_bit")) != AWQ_BITS:
        return f"bits={settings.get('bits')!r}, where {AWQ_BITS} can be read"
    if str(settings.get("version", "gemm")).lower() != "gemm":
        return f"version={settings['version']!r}, where 'gemm' can be read"
    return None


def _gptq_reason(settings: Mapping[str, Any]) -> str | None:
    if settings.get("bits") not in GPTQ_BITS:
        return f"bits={settings.get('bits')!r}, where {', '.join(map(str, GPTQ_BITS))} can be read"
    if (kind := settings.get("checkpoint_format", "gptq")) not in ("gptq", "gptq_v2"):
        return f"checkpoint_format={kind!r}, where 'gptq' and 'gptq_v2' can be read"
    return None


def _compressed_reason(settings: Mapping[str, Any]) -> str | None:
    groups = settings.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        return f"config_groups={groups!r}, which says nothing of the weights"
    if (settings.get("sparsity_config") or {}).get("format", "dense") != "dense":
        return f"sparsity format {settings['sparsity_config']['format']!r}, where 'dense' can be read"
    return None


_REASONS: dict[str, Callable[[Mapping[str, Any]], str | None]] = {
    "awq": _awq_reason,
    "gptq": _gptq_reason,
    COMPRESSED_TENSORS: _compressed_reason,
}
