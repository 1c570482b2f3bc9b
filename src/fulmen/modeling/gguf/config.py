"""The Transformers config of a GGUF file, from its header and the names and shapes of its tensors."""

import re
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from fulmen.errors import CheckpointError, UnsupportedModelError
from fulmen.modeling.families import family_for_type
from fulmen.modeling.gguf.file import GgufModel
from fulmen.modeling.gguf.gemma3 import gemma3_values
from fulmen.modeling.gguf.keys import require_known_keys
from fulmen.modeling.gguf.rope import gguf_rope_parameters
from fulmen.modeling.gguf.tokenizer import special_ids

# Architectures whose tensors we know; "llama" is Mistral's too, whose layers are the same.
GGUF_ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3")
# Transformers' `model_type`, where it is another name; of Gemma 3 a file holds the text model alone.
_MODEL_TYPES = {"gemma3": "gemma3_text"}

# Projections that have a bias all together, in models that may have one.
_ATTENTION_BIAS = {
    "llama": ("attn_q", "attn_k", "attn_v", "attn_output"),
    "qwen3": ("attn_q", "attn_k", "attn_v"),
}
_MLP_BIAS = {"llama": ("ffn_gate", "ffn_up", "ffn_down")}


def gguf_config(model: GgufModel) -> PreTrainedConfig:
    """The config of the stock model whose numbers are those of the file.

    Raises:
        UnsupportedModelError: another architecture, or keys that change the numbers in a way that the
            stock model has no word for.
        CheckpointError: keys that are missing, contradict each other or the tensors' shapes.
    """
    if model.architecture not in GGUF_ARCHITECTURES:
        # Says which are known if this one has no family at all.
        family_for_type(model.architecture)
        raise UnsupportedModelError(
            f"{model.path} has the architecture {model.architecture!r}; GGUF files of "
            f"{', '.join(GGUF_ARCHITECTURES)} can be read; convert its original checkpoint"
        )
    require_known_keys(model)
    try:
        return AutoConfig.for_model(_model_type(model), **_config_values(model))
    except (CheckpointError, UnsupportedModelError):
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise CheckpointError(
            f"{model.path} has a header that cannot be ({reason.strip()[:200]}); get it anew"
        ) from error


def _config_values(model: GgufModel) -> dict[str, Any]:
    heads = _uniform(model, "attention.head_count")
    hidden, context = _uniform(model, "embedding_length"), _uniform(model, "context_length")
    vocabulary = _vocabulary(model)
    head_dim = _head_dim(model, heads)
    values = {
        "architectures": [family_for_type(_model_type(model)).source_class.__name__],  # type: ignore[attr-defined]
        "dtype": model.dtype,
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": _uniform(model, "feed_forward_length"),
        "num_hidden_layers": _uniform(model, "block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": _uniform(model, "attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": context,
        "rms_norm_eps": float(_uniform(model, "attention.layer_norm_rms_epsilon")),
        "rope_parameters": gguf_rope_parameters(model, head_dim, context),
        "tie_word_embeddings": "output.weight" not in model.tensors,
        **special_ids(model),
    }
    for key, projections in (("attention_bias", _ATTENTION_BIAS), ("mlp_bias", _MLP_BIAS)):
        if names := projections.get(model.architecture):
            pattern = re.compile(rf"blk\.\d+\.({'|'.join(names)})\.bias")
            values[key] = any(pattern.fullmatch(name) for name in model.tensors)
    if model.architecture == "gemma3":
        values |= gemma3_values(model, values)
    else:
        _require_no_window(model, context)
    _require_scale(model, values.get("query_pre_attn_scalar", head_dim))
    return values


def _model_type(model: GgufModel) -> str:
    return _MODEL_TYPES.get(model.architecture, model.architecture)


def _uniform(model: GgufModel, key: str, default: Any = None) -> Any:
    """One value for all layers, however often the file repeats it."""
    value = model.get(key, default)
    if value is None:
        raise CheckpointError(f"{model.path} lacks {model.architecture}.{key}; get it anew")
    if isinstance(value, list):
        if len(set(value)) != 1:
            raise UnsupportedModelError(
                f"{model.path} has {model.architecture}.{key} of {min(value)} to {max(value)} by layer; "
                "only models whose layers are alike are supported"
            )
        value = value[0]
    if not isinstance(value, int | float) or not value > 0:
        raise CheckpointError(
            f"{model.path} has {model.architecture}.{key}={value!r}, which cannot be; get it anew"
        )
    return value


def _vocabulary(model: GgufModel) -> int:
    """Rows of the embedding."""
    if "token_embd.weight" not in model.tensors:
        raise CheckpointError(f"{model.path} lacks token_embd.weight; get it anew, all parts of it")
    rows = model.tensors["token_embd.weight"].shape[0]
    tokens = model.metadata.get("tokenizer.ggml.tokens", ())
    if model.get("vocab_size", rows) != rows or len(tokens) > rows:
        raise CheckpointError(
            f"{model.path} has {rows} embeddings, vocab_size={model.get('vocab_size')} and {len(tokens)} "
            "tokens in its tokenizer; get it anew"
        )
    return rows


def _head_dim(model: GgufModel, heads: int) -> int:
    """As stated, else as wide as the queries' rows allow."""
    if "blk.0.attn_q.weight" not in model.tensors:
        raise CheckpointError(f"{model.path} lacks blk.0.attn_q.weight; get it anew, all parts of it")
    width = model.get("attention.key_length", model.tensors["blk.0.attn_q.weight"].shape[0] // heads)
    if (values := model.get("attention.value_length", width)) != width:
        raise UnsupportedModelError(
            f"{model.path} has keys of width {width} and values of {values}; only equal widths are supported"
        )
    return width


def _require_scale(model: GgufModel, divisor: int) -> None:
    scale = model.get("attention.scale", 0.0)
    if scale and abs(scale * divisor**0.5 - 1) > 1e-5:
        raise UnsupportedModelError(
            f"{model.path} sets attention.scale={scale:g}; only 1/sqrt({divisor}) = {divisor**-0.5:g} "
            "is supported"
        )


def _require_no_window(model: GgufModel, context: int) -> None:
    if 0 < (window := model.get("attention.sliding_window", 0)) < context:
        raise UnsupportedModelError(
            f"{model.path} sets attention.sliding_window={window} below the context of {context}, and "
            "its header does not say in which layers; convert the original checkpoint"
        )
