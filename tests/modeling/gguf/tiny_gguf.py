"""Writes tiny models as GGUF files, as llama.cpp's converter lays them out."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from transformers import PreTrainedModel

from tests.modeling.gqa.tiny_gqa import VOCAB, make_dense

# A vocabulary of bytes: every text can be written, and nothing is ever merged but "Ġt" and "he".
BYTES = ["Ġ", *map(chr, range(ord("!"), ord("~") + 1))][: VOCAB - 7]
TOKENS = ["<pad>", "<s>", "</s>", *BYTES, "Ġt", "he", "<|user|>", "<｜start▁here｜>"]
MERGES = ["Ġ t", "h e"]
CONTROL = ("<pad>", "<s>", "</s>", "<｜start▁here｜>")
USER_DEFINED = ("<|user|>",)
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"


# Where llama.cpp's name for an architecture is not Transformers' `model_type`.
ARCHITECTURES = {"gemma3_text": "gemma3"}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "default", "rope_theta": 1000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
}


def make_source(architecture: str, **changes: Any) -> PreTrainedModel:
    """A tiny dense model that a file can hold: Gemma 3's have no word for the logits' scale."""
    own = {"query_pre_attn_scalar": 24, "rope_parameters": GEMMA3_ROPE} if architecture == "gemma3" else {}
    return make_dense(architecture, **{**own, **changes})


def tokenizer_keys() -> dict[str, Any]:
    """Byte-level BPE with the control tokens at the front and at the end."""
    types = [3 if token in CONTROL else 4 if token in USER_DEFINED else 1 for token in TOKENS]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.chat_template": TEMPLATE,
    }


def shape_keys(model: PreTrainedModel, architecture: str) -> dict[str, Any]:
    """What llama.cpp's converter writes of a config."""
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    values = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
    }
    if architecture == "gemma3":
        values |= _gemma3_keys(config)
    else:
        values["rope.freq_base"] = float(config.rope_parameters["rope_theta"])
    return {f"{architecture}.{name}": value for name, value in values.items()}


def _gemma3_keys(config: Any) -> dict[str, Any]:
    full, sliding = (config.rope_parameters[kind] for kind in ("full_attention", "sliding_attention"))
    return {
        "attention.sliding_window": config.sliding_window,
        "attention.sliding_window_pattern": [kind == "sliding_attention" for kind in config.layer_types],
        "rope.freq_base": full["rope_theta"],
        "rope.freq_base_swa": sliding["rope_theta"],
        **({"rope.scaling.factor": full["factor"]} if "factor" in full else {}),
    }


def tensors_of(model: PreTrainedModel, architecture: str) -> dict[str, torch.Tensor]:
    """The weights under their names in a GGUF file; rotary pairs of llama files stand beside each other.

    Gemma's norms are stored with the 1 that they add to their weight.
    """
    config = model.config
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    tensors = {}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stem, _, suffix = name.rpartition(".")
        if architecture == "llama" and (count := heads.get(stem.split(".")[-1])):
            weight = weight.view(count, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)
        if architecture == "gemma3" and name.endswith("norm.weight"):
            weight = weight + 1
        tensors[f"{names.get_name(stem)}.{suffix}"] = weight
    return tensors


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    architecture: str | None = None,
    *,
    keys: dict[str, Any] | None = None,
    tensors: dict[str, Any] | None = None,
    matrices: Type = Type.F32,
) -> Path:
    """One file.

    Args:
        keys, tensors: in place of what the model has, or besides; None as a value leaves one out.
        matrices: type of all that have two axes.
    """
    model_type = model.config.model_type
    architecture = architecture or ARCHITECTURES.get(model_type, model_type)
    all_keys = {**shape_keys(model, architecture), **tokenizer_keys(), **(keys or {})}
    all_tensors = {**tensors_of(model, architecture), **(tensors or {})}
    return write_file(path, architecture, all_keys, all_tensors, matrices)


def write_split(path: Path, model: PreTrainedModel, places: dict[str, int], count: int) -> list[Path]:
    """`count` files, PATH-00001-of-0000N.gguf, tensors where `places` says, else in the first as the keys."""
    architecture = model.config.model_type
    tensors = tensors_of(model, architecture)
    parts = []
    for part in range(count):
        keys: dict[str, Any] = {"split.no": part, "split.count": count, "split.tensors.count": len(tensors)}
        if part == 0:
            keys |= {**shape_keys(model, architecture), **tokenizer_keys()}
        own = {name: tensor for name, tensor in tensors.items() if places.get(name, 0) == part}
        file = path.with_name(f"{path.name}-{part + 1:05d}-of-{count:05d}.gguf")
        parts.append(write_file(file, architecture if part == 0 else None, keys, own))
    return parts


def write_file(
    path: Path,
    architecture: str | None,
    keys: dict[str, Any],
    tensors: dict[str, Any],
    matrices: Type = Type.F32,
) -> Path:
    """One file with just these keys and tensors."""
    writer = gguf.GGUFWriter(path, architecture or "none")
    if architecture is None:
        del writer.kv_data[0]["general.architecture"]
    for key, value in keys.items():
        if value is not None:
            _add(writer, key, value)
    for name, tensor in tensors.items():
        if tensor is not None:
            _add_tensor(writer, name, torch.as_tensor(tensor).detach().float().contiguous().numpy(), matrices)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    adders = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
    }
    adders.get(type(value), writer.add_array)(key, value)


def _add_tensor(writer: gguf.GGUFWriter, name: str, numbers: np.ndarray, matrices: Type) -> None:
    kind = matrices if numbers.ndim == 2 else Type.F32
    writer.add_tensor(name, gguf.quantize(numbers, kind), raw_dtype=kind)
