"""A GGUF file as a stock Transformers model: every tensor has its place, or is refused by name."""

from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from fulmen.errors import CheckpointError, UnsupportedModelError
from fulmen.modeling.families import family_for_type
from fulmen.modeling.gguf.config import gguf_config
from fulmen.modeling.gguf.file import GgufModel, GgufTensor, read_gguf
from fulmen.modeling.gguf.gemma3 import NORM_OFFSET
from fulmen.modeling.gguf.rope import ROPE_TENSORS
from fulmen.modeling.gguf.tokenizer import gguf_tokenizer
from fulmen.ops.half_products import hasten_half_products


def load_gguf(path: str | Path, dtype: torch.dtype | str = "auto") -> tuple[PreTrainedModel, Any]:
    """The model of a GGUF file (of all its parts, if it is split) and its tokenizer.

    Beside the weights as `dtype`, only a few rows of one tensor are in memory.

    Args:
        dtype: of the weights; "auto" is the file's own, and bfloat16 for a quantized one.

    Raises:
        CheckpointError: damaged or incomplete.
        UnsupportedModelError: an architecture, a key or a tensor that the stock model has no word for.
    """
    model, config = read_sound_gguf(path)
    tokenizer = gguf_tokenizer(model)
    wanted = model.dtype if dtype in ("auto", None) else dtype
    wanted = getattr(torch, wanted) if isinstance(wanted, str) else wanted
    state = {
        name: _loaded(name, tensor, shape, config, wanted)
        for name, (tensor, shape) in _places(model, config).items()
    }
    stock: Any = _stock_class(config)
    loaded: PreTrainedModel = stock.from_pretrained(None, config=config, state_dict=state, dtype=wanted)
    # Not the "None" that Transformers notes as the place it came from.
    loaded.config.name_or_path = loaded.name_or_path = ""
    hasten_half_products(wanted)
    return loaded, tokenizer


def read_sound_gguf(path: str | Path) -> tuple[GgufModel, PreTrainedConfig]:
    """The header and config of a file whose tensors are all there, with the shapes that its keys state.

    No tensor is read, but for RoPE's factors. Raises as `load_gguf`.
    """
    model = read_gguf(path)
    config = gguf_config(model)
    _places(model, config)
    return model, config


def _places(model: GgufModel, config: PreTrainedConfig) -> dict[str, tuple[GgufTensor | None, torch.Size]]:
    """Each weight of the stock model, with the tensor that holds it (None: a bias of zeros) and its shape."""
    with torch.device("meta"):
        empty = _stock_class(config)(config)
    names = gguf.get_tensor_name_map(_architecture(model), config.num_hidden_layers)
    tied = set(getattr(empty, "all_tied_weights_keys", ()) if config.tie_word_embeddings else ())
    places: dict[str, tuple[GgufTensor | None, torch.Size]] = {}
    used = set(ROPE_TENSORS)
    for name, weight in empty.state_dict().items():
        if name in tied:
            continue
        stem, _, suffix = name.rpartition(".")
        stored = f"{names.get_name(stem)}.{suffix}"
        tensor = model.tensors.get(stored)
        if tensor is None and not _may_be_absent(model, stored):
            raise CheckpointError(f"{model.path} lacks {stored}; get it anew, all parts of it")
        if tensor is not None and torch.Size(tensor.shape) != weight.shape:
            raise CheckpointError(
                f"{model.path} has {stored} of the shape {list(tensor.shape)}, and its header asks for "
                f"{list(weight.shape)}; get it anew"
            )
        places[name] = (tensor, weight.shape)
        used.add(stored)
    if unknown := sorted(model.tensors.keys() - used):
        raise UnsupportedModelError(
            f"{model.path} holds {len(unknown)} tensors that {config.model_type} has no place for, the first "
            f"{unknown[0]}; convert the original checkpoint instead"
        )
    return places


def _may_be_absent(model: GgufModel, stored: str) -> bool:
    """A bias that no layer has, in a model whose stock class has all biases or none: zeros."""
    kind = stored.split(".", 2)[-1]
    return (
        kind.endswith(".bias")
        and model.architecture != "qwen2"
        and not any(name.endswith(f".{kind}") for name in model.tensors)
    )


def _loaded(
    name: str, tensor: GgufTensor | None, shape: torch.Size, config: PreTrainedConfig, dtype: torch.dtype
) -> Tensor:
    if tensor is None:
        return torch.zeros(shape, dtype=dtype)
    if config.model_type == "gemma3_text" and name.endswith("norm.weight"):
        return (tensor.load(torch.float32) - NORM_OFFSET).to(dtype)
    loaded = tensor.load(dtype)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    count = heads.get(name.split(".")[-2]) if config.model_type == "llama" else None
    return loaded if count is None else _half_split_rows(loaded, count)


def _half_split_rows(rows: Tensor, heads: int) -> Tensor:
    """Rotary pairs as Transformers has them, dims p and p + D/2; llama files have dims 2p and 2p + 1.

    rows: [heads * D, ...].
    """
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(rows.shape)


def _stock_class(config: PreTrainedConfig) -> Any:
    return family_for_type(config.model_type).source_class  # type: ignore[attr-defined]


def _architecture(model: GgufModel) -> gguf.MODEL_ARCH:
    return next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == model.architecture)
