"""What becomes of each key of a GGUF header: read, of no effect, or refused where it would change numbers.

Keys of the architecture's own namespace and of `tokenizer.` that stand in no list are refused too, unless
their value says "no": what llama.cpp learns next must not become a silent difference. Keys of other
namespaces describe the file (`general.`, `split.`, `quantize.`, its maker's) or another model's shape.
"""

from typing import Any

from fulmen.errors import UnsupportedModelError
from fulmen.modeling.gguf.file import GgufModel
from fulmen.modeling.gguf.gemma3 import GEMMA3_KEYS

# After the architecture's name. `gguf_config` and `gguf_rope` read them, or compare them with the tensors.
READ_KEYS = {
    "vocab_size",
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "attention.sliding_window",
    "attention.scale",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.attn_factor",
    "rope.scaling.original_context_length",
    "rope.scaling.yarn_ext_factor",
    "rope.scaling.yarn_attn_factor",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
}
# Of one architecture alone: another one's layers would be others by them.
ARCHITECTURE_KEYS = {"gemma3": GEMMA3_KEYS}
# llama.cpp reads neither: a name for the usual order of rows, and whether the scaling was trained.
INERT_KEYS = {"tensor_data_layout", "rope.scaling.finetuned"}
# Values that say "no" besides 0, False and nothing.
NEUTRAL_VALUES = {
    "attention.causal": (True,),
    "attention.output_scale": (1.0,),
    "embedding_scale": (1.0,),
    "logit_scale": (1.0,),
    "residual_scale": (1.0,),
    "rope.scaling.alpha": (1.0,),
}

TOKENIZER_READ_KEYS = {
    "tokenizer.ggml.model",
    "tokenizer.ggml.pre",
    "tokenizer.ggml.tokens",
    "tokenizer.ggml.token_type",
    "tokenizer.ggml.scores",
    "tokenizer.ggml.merges",
    "tokenizer.ggml.bos_token_id",
    "tokenizer.ggml.eos_token_id",
    "tokenizer.ggml.eot_token_id",
    "tokenizer.ggml.eom_token_id",
    "tokenizer.ggml.unknown_token_id",
    "tokenizer.ggml.padding_token_id",
    "tokenizer.ggml.add_bos_token",
    "tokenizer.ggml.add_eos_token",
    "tokenizer.ggml.add_space_prefix",
    "tokenizer.chat_template",
}
# Ids of tokens that are in the vocabulary anyway, other tokenizers' needs, second copies of the tokenizer.
TOKENIZER_INERT_KEYS = {
    "tokenizer.ggml.token_type_count",
    "tokenizer.ggml.seperator_token_id",
    "tokenizer.ggml.mask_token_id",
    "tokenizer.ggml.fim_pre_token_id",
    "tokenizer.ggml.fim_suf_token_id",
    "tokenizer.ggml.fim_mid_token_id",
    "tokenizer.ggml.fim_pad_token_id",
    "tokenizer.ggml.fim_rep_token_id",
    "tokenizer.ggml.fim_sep_token_id",
    "tokenizer.ggml.prefix_token_id",
    "tokenizer.ggml.suffix_token_id",
    "tokenizer.ggml.middle_token_id",
    "tokenizer.huggingface.json",
    "tokenizer.rwkv.world",
    "tokenizer.chat_templates",
}
# Templates by name, as tokenizer.chat_template.tool_use.
CHAT_TEMPLATE_PREFIX = "tokenizer.chat_template."
# Of files that are no language model of their own, or one with another function in it.
FOREIGN_NAMESPACES = ("adapter.", "clip.", "diffusion.", "xielu.")


def require_known_keys(model: GgufModel) -> None:
    """Raise UnsupportedModelError for the first key that would change the numbers and is not read."""
    kind = model.metadata.get("general.type", "model")
    if kind != "model":
        raise UnsupportedModelError(
            f"{model.path} is of general.type={kind!r}, no language model; name the model's file"
        )
    for key, value in model.metadata.items():
        if not _is_known(key, model.architecture) and not _says_no(key, value, model.architecture):
            raise UnsupportedModelError(
                f"{model.path} sets {key}={_shown(value)}, which would change the model's numbers and is not "
                "supported; convert the original checkpoint instead"
            )


def _is_known(key: str, architecture: str) -> bool:
    if key.startswith(f"{architecture}."):
        known = READ_KEYS | INERT_KEYS | ARCHITECTURE_KEYS.get(architecture, set())
        return key.removeprefix(f"{architecture}.") in known
    if key.startswith("tokenizer."):
        known = TOKENIZER_READ_KEYS | TOKENIZER_INERT_KEYS
        return key in known or key.startswith(CHAT_TEMPLATE_PREFIX)
    return not key.startswith(FOREIGN_NAMESPACES)


def _says_no(key: str, value: Any, architecture: str) -> bool:
    if isinstance(value, list):
        return not any(value)
    return not value or value in NEUTRAL_VALUES.get(key.removeprefix(f"{architecture}."), ())


def _shown(value: Any) -> str:
    return f"[{len(value)} values]" if isinstance(value, list) else repr(value)[:60]
