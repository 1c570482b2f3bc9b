"""A tiny dense model directory with tokenizer, to change and break."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.modeling.gqa.tiny_gqa import VOCAB, make_dense

WEIGHTS = "model.safetensors"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def make_tokenizer(size: int = VOCAB) -> PreTrainedTokenizerFast:
    """Words w0, w1 and so on."""
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(size)}, unk_token="w2"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", bos_token="w1", unk_token="w2")


def save_source(folder: Path, model: PreTrainedModel | None = None) -> Path:
    model = model or make_dense("llama")
    model.save_pretrained(folder)
    make_tokenizer(model.config.vocab_size).save_pretrained(folder)
    return folder


def edit_json(file: Path, **changes) -> None:
    """Set values; None removes them."""
    values = json.loads(file.read_text()) if file.exists() else {}
    for key, value in changes.items():
        values.pop(key, None) if value is None else values.update({key: value})
    file.write_text(json.dumps(values))


def edit_weights(folder: Path, changes: dict[str, Tensor | None]) -> None:
    """Set tensors by their names; None removes them."""
    held = load_file(folder / WEIGHTS)
    for name, tensor in changes.items():
        held.pop(name) if tensor is None else held.update({name: tensor})
    save_file(held, folder / WEIGHTS, {"format": "pt"})


def own_head(folder: Path) -> Tensor:
    """Put a head of its own into a directory's file; return it."""
    embedding = load_file(folder / WEIGHTS)[EMBEDDING]
    head = torch.randn(embedding.shape, generator=torch.Generator().manual_seed(5))
    edit_weights(folder, {HEAD: head})
    return head
