"""The RoPE that a GGUF file asks for, as Transformers' `rope_parameters`.

llama.cpp rotates pair p of a head at position t by t / (factor * f[p]) * theta^(-2p / D) under "linear"
scaling, f being the tensor `rope_freqs.weight` (1 without it); "yarn" and "longrope" are Transformers' own.
"""

import math
from typing import Any

import torch
from torch import Tensor

from fulmen.errors import CheckpointError, UnsupportedModelError
from fulmen.modeling.gguf.file import GgufModel

FREQUENCY_FACTORS = "rope_freqs.weight"
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"
ROPE_TENSORS = {FREQUENCY_FACTORS, LONG_FACTORS, SHORT_FACTORS}

# llama.cpp's, for keys that the file does not set.
_DEFAULT_THETA = 10000.0
_DEFAULT_BETAS = {"beta_fast": 32.0, "beta_slow": 1.0}
# Of Llama 3.1 to 3.3 and all that follow them; only ratios to the context matter, which is searched for.
_LLAMA3_BANDS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA3_CONTEXT = 8192
_FACTOR_TOLERANCE = 1e-5
# Of numbers that the file has in float32.
_SAME = 1e-6


def gguf_rope_parameters(model: GgufModel, head_dim: int, context: int) -> dict[str, Any]:
    """`rope_parameters` whose frequencies and attention factor are those of the file.

    Args:
        head_dim: width D of a head; all of it is rotary.
        context: `max_position_embeddings`.

    Raises:
        UnsupportedModelError: partial RoPE, or a combination of scalings that Transformers cannot express.
        CheckpointError: factors that cannot be.
    """
    rotary = model.get("rope.dimension_count", head_dim)
    if rotary != head_dim:
        raise UnsupportedModelError(
            f"{model.path} has RoPE on {rotary} of a head's {head_dim} dims; only RoPE on all is supported"
        )
    theta = float(model.get("rope.freq_base", _DEFAULT_THETA))
    kind = model.get("rope.scaling.type", "linear")
    factors = _loaded_factors(model, FREQUENCY_FACTORS, head_dim)
    if model.tensors.keys() & {LONG_FACTORS, SHORT_FACTORS} and kind != "yarn":
        kind = "longrope"
    if kind in ("yarn", "longrope"):
        if factors is not None:
            raise _unsupported(model, kind, f"together with {FREQUENCY_FACTORS}")
        scaled = _yarn if kind == "yarn" else _longrope
        return {"rope_theta": theta, **scaled(model, head_dim, context)}
    if kind not in ("none", "linear"):
        raise _unsupported(model, kind, "which is not known; known are none, linear, yarn and longrope")
    _require_unset(model, kind, "attn_factor", neutral=1.0)
    _require_unset(model, kind, "yarn_ext_factor", neutral=0.0)
    factor = _linear_factor(model) if kind == "linear" else 1.0
    if factors is not None and factors.min() < factors.max():
        return {"rope_theta": theta, **_per_pair(factors * factor, theta, context, model)}
    factor *= 1.0 if factors is None else factors[0].item()
    if factor != 1.0:
        return {"rope_theta": theta, "rope_type": "linear", "factor": factor}
    return {"rope_theta": theta, "rope_type": "default"}


def _linear_factor(model: GgufModel) -> float:
    """0 means none, to llama.cpp."""
    factor = float(model.get("rope.scaling.factor", model.get("rope.scale_linear", 0.0)) or 1.0)
    if not 0 < factor < math.inf:
        raise CheckpointError(f"{model.path} scales RoPE by {factor}, which cannot be; get it anew")
    return factor


def _yarn(model: GgufModel, head_dim: int, context: int) -> dict[str, Any]:
    if model.tensors.keys() & ROPE_TENSORS:
        raise _unsupported(model, "yarn", f"together with {LONG_FACTORS}")
    _require_unset(model, "yarn", "yarn_ext_factor", neutral=1.0)
    factor = _linear_factor(model)
    usual = 0.1 * math.log(factor) + 1.0 if factor > 1.0 else 1.0
    # The writer's word for the whole factor, and llama.cpp's for another one on top.
    whole = float(model.get("rope.scaling.yarn_attn_factor", 0.0)) or usual
    attention_factor = whole * float(model.get("rope.scaling.attn_factor", 1.0))
    values: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": model.get("rope.scaling.original_context_length", context),
    }
    if not math.isclose(attention_factor, usual, rel_tol=_SAME):
        values["attention_factor"] = attention_factor
    for name, default in _DEFAULT_BETAS.items():
        if (beta := float(model.get(f"rope.scaling.yarn_{name}", default))) != default:
            values[name] = beta
    return values


def _longrope(model: GgufModel, head_dim: int, context: int) -> dict[str, Any]:
    _require_unset(model, "longrope", "factor", neutral=1.0)
    _require_unset(model, "longrope", "yarn_ext_factor", neutral=0.0)
    long, short = (_loaded_factors(model, name, head_dim) for name in (LONG_FACTORS, SHORT_FACTORS))
    if long is None or short is None:
        raise CheckpointError(
            f"{model.path} lacks {LONG_FACTORS} or {SHORT_FACTORS} of its longrope; get it anew"
        )
    original = model.get("rope.scaling.original_context_length", context)
    attention_factor = float(model.get("rope.scaling.attn_factor", 1.0))
    return _longrope_values(short, long, original, context, attention_factor)


def _longrope_values(
    short: Tensor, long: Tensor, original: int, context: int, attention_factor: float
) -> dict[str, Any]:
    ratio = context / original
    values: dict[str, Any] = {
        "rope_type": "longrope",
        "factor": ratio,
        "short_factor": short.tolist(),
        "long_factor": long.tolist(),
        "original_max_position_embeddings": original,
    }
    usual = math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 else 1.0
    if not math.isclose(attention_factor, usual, rel_tol=_SAME):
        values["attention_factor"] = attention_factor
    return values


def _per_pair(factors: Tensor, theta: float, context: int, model: GgufModel) -> dict[str, Any]:
    """One factor for each rotary pair: Llama 3's where its formula gives the same, else LongRoPE."""
    stated = model.get("rope.scaling.original_context_length", _LLAMA3_CONTEXT)
    factor = round(factors.max().item(), 4)
    for original in (stated, _LLAMA3_CONTEXT, context, *(2**power for power in range(5, 21))):
        values = {**_LLAMA3_BANDS, "factor": factor, "original_max_position_embeddings": original}
        if torch.allclose(
            _llama3_factors(values, theta, len(factors)), factors, rtol=_FACTOR_TOLERANCE, atol=0
        ):
            return {"rope_type": "llama3", **values}
    return _longrope_values(factors, factors, context, context, 1.0)


def _llama3_factors(values: dict[str, Any], theta: float, pairs: int) -> Tensor:
    """[D/2] float64, what Llama 3.1 divides each frequency by: 1 for short waves, `factor` for long ones."""
    waves = 2 * math.pi * theta ** (torch.arange(pairs, dtype=torch.float64) / pairs)
    low, high = values["low_freq_factor"], values["high_freq_factor"]
    smooth = ((values["original_max_position_embeddings"] / waves - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - smooth) / values["factor"] + smooth)


def _loaded_factors(model: GgufModel, name: str, head_dim: int) -> Tensor | None:
    """[D/2] float64."""
    if name not in model.tensors:
        return None
    factors = model.tensors[name].load(torch.float32).flatten().double()
    if len(factors) != head_dim // 2 or not (factors > 0).all() or not factors.isfinite().all():
        raise CheckpointError(
            f"{model.path} has {len(factors)} values in {name}, not {head_dim // 2} above 0; get it anew"
        )
    return factors


def _require_unset(model: GgufModel, kind: str, name: str, neutral: float) -> None:
    value = float(model.get(f"rope.scaling.{name}", neutral))
    # -1 is llama.cpp's "as the type has it".
    if value not in (neutral, -1.0):
        raise _unsupported(model, kind, f"with {name}={value:g}")


def _unsupported(model: GgufModel, kind: str, what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{model.path} has RoPE scaling {kind!r} {what}; convert the original checkpoint instead"
    )
