"""The converted model's weights as dense peers want them: a stock checkpoint, and GGUF files made from it."""

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from safetensors.torch import load_file, save_file

from fulmen.errors import UnsupportedModelError


def make_dense_twin(model: Path, folder: Path) -> Path:
    """The stock checkpoint with the converted model's weights."""
    folder.mkdir()
    for file in model.glob("*.safetensors"):
        weights = {name: x for name, x in load_file(file).items() if ".indexer." not in name}
        save_file(weights, folder / file.name, {"format": "pt"})
    for file in model.glob("*token*.json"):
        shutil.copy(file, folder)
    config = json.loads((model / "config.json").read_text())
    config["architectures"] = [name.replace("Dsa", "") for name in config["architectures"]]
    config["model_type"] = config["model_type"].removesuffix("_dsa")
    config = {key: value for key, value in config.items() if key not in ("dsa", "auto_map")}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_gguf(dense: Path, target: Path, matrices: Type, embeddings: Type) -> Path:
    """A GGUF file of a Llama checkpoint, without a vocabulary: it takes and gives token ids.

    Raises:
        UnsupportedModelError: another architecture, whose layout in GGUF is another.
    """
    config = json.loads((dense / "config.json").read_text())
    rope = config["rope_parameters"]["rope_type"]
    if (config["model_type"], rope) != ("llama", "default"):
        raise UnsupportedModelError(
            f"GGUF files are made of llama models with plain RoPE, not of {config['model_type']} with {rope}"
        )
    writer = gguf.GGUFWriter(target, "llama")
    write_shape(writer, config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for file in sorted(dense.glob("*.safetensors")):
        for name, x in load_file(file).items():
            numbers = for_llama_cpp(name, x.float().numpy(), config)
            kind = Type.F32 if x.ndim == 1 else embeddings if "embed_tokens" in name else matrices
            translated = names.get_name(name, try_suffixes=(".weight", ".bias"))
            writer.add_tensor(translated, gguf.quantize(numbers, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def write_shape(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    heads = config["num_attention_heads"]
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config.get("head_dim") or config["hidden_size"] // heads)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")


def for_llama_cpp(name: str, numbers: np.ndarray, config: dict[str, Any]) -> np.ndarray:
    """Rows of q and k in llama.cpp's order: it turns neighbouring dims, Transformers dims p and p + D/2."""
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
    if heads is None:
        return numbers
    by_half = numbers.reshape(config[heads], 2, -1, *numbers.shape[1:])
    return np.ascontiguousarray(by_half.swapaxes(1, 2).reshape(numbers.shape))
