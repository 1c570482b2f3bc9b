"""LoRA for the backbone (peft, an option): low-rank updates that are merged into the weights at the end."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from fulmen.errors import ConfigError

# The linear maps of attention and MLP; the indexers are trained in full, embeddings and norms not at all.
TARGETS = r"(?!.*\.indexer\.).*\.(self_attn|mlp)\.(.*_proj(_with_mqa)?|c_fc)"


def add_lora(model: PreTrainedModel, rank: int, seed: int) -> None:
    """Freeze the backbone and put adapters of `rank` beside its linear maps, in place.

    Raises ConfigError if peft is not installed.
    """
    if importlib.util.find_spec("peft") is None:
        raise ConfigError("lora needs the package peft; install fulmen[lora], or leave it out")
    from peft import LoraConfig, inject_adapter_in_model

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS), model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or ".indexer." in name)


@contextmanager
def without_lora(model: PreTrainedModel) -> Iterator[None]:
    """The model without its adapters, as it was, in the `with` block."""
    layers = lora_layers(model)
    for _, layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for _, layer in layers:
            layer.enable_adapters(True)


def merge_lora(model: PreTrainedModel) -> None:
    """Add the adapters to the weights and take them away; nothing happens where there are none."""
    for name, layer in lora_layers(model):
        layer.merge()
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())
    for leftover in ("peft_config", "_hf_peft_config_loaded"):
        vars(model).pop(leftover, None)


def lora_layers(model: PreTrainedModel) -> list[tuple[str, Any]]:
    """The linear maps that have adapters beside them, with their names; none without peft."""
    if importlib.util.find_spec("peft") is None:
        return []
    from peft.tuners.lora import LoraLayer

    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]
