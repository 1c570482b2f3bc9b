"""What an entry for a model type without a family would take, as far as Transformers' classes of it tell."""

import sys
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

GUIDE = "see 'Add a model family' in CONTRIBUTING.md"
PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj"}
NORMS = {"q_norm", "k_norm", "query_layernorm", "key_layernorm"}


def needed_entry(model_type: Any) -> str:
    """In words: the file to make and what it would say, or why there can be none."""
    if inside := _language_model_inside(model_type):
        return (
            f"a language model ({inside}) is inside it: an entry would be src/fulmen/modeling/vision/"
            f"{model_type}.py, about ten lines, beside a family for that: {GUIDE}"
        )
    stock = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type) if isinstance(model_type, str) else None
    if not stock:
        return "Transformers has no language model of that type either, which an entry would be made from"
    config_class: Any = CONFIG_MAPPING[model_type]
    if "num_attention_heads" not in {*vars(config_class), *config_class.attribute_map}:
        return "it has no attention that DSA could take the place of"
    name = stock.replace("ForCausalLM", "Attention")
    attention = _stock_attention(config_class, name)
    keywords = None if attention is None else entry_keywords(attention)
    if attention is None or keywords is None:
        return (
            f"an entry takes queries, keys and values from {name} as no projection of fulmen's does: {GUIDE}"
        )
    others = ", ".join(sorted(attention._modules.keys() - PROJECTIONS - NORMS - {"qkv_proj"}))
    return (
        f"an entry would be src/fulmen/modeling/families/{model_type}.py, about ten lines with {keywords}, "
        f"as far as the parts of {name} tell{f' (not what {others} does)' if others else ''}: {GUIDE}"
    )


def _language_model_inside(model_type: Any) -> str | None:
    """Of a model that reads images or sounds too, what its language model is; None: it is one itself."""
    is_known = isinstance(model_type, str) and model_type in CONFIG_MAPPING
    parts = CONFIG_MAPPING[model_type].sub_configs if is_known else {}
    if "text_config" not in parts:
        return None
    return getattr(parts["text_config"], "model_type", "") or "the config's text_config says which"


def entry_keywords(attention: nn.Module) -> str | None:
    """Keywords of `dsa_classes` that fit the parts of a stock attention; None: no projection there does."""
    parts: Any = attention._modules
    if {"qkv_proj", "o_proj"} <= parts.keys():
        return "project=project_fused_heads"
    if not parts.keys() >= PROJECTIONS:
        return None
    if "query_layernorm" in parts:
        return "project=project_heads, prepare=norm_turned_heads"
    queries, heads = parts["q_proj"].out_features, parts["o_proj"].in_features
    if queries == 2 * heads:
        return "project=project_gated_heads"
    if getattr(parts.get("q_norm"), "weight", None) is not None:
        wide = parts["q_norm"].weight.numel() == queries
        return f"project={'project_wholly_normed_heads' if wide else 'project_normed_heads'}"
    return f"project={'project_interleaved_heads' if _turns_neighbours(attention) else 'project_heads'}"


def _stock_attention(config_class: Any, name: str) -> nn.Module | None:
    """The attention of a layer by the config's defaults, without weights; None where it cannot be made so."""
    try:
        module = sys.modules[AutoModelForCausalLM._model_mapping[config_class].__module__]
        with torch.device("meta"):
            attention: nn.Module = getattr(module, name)(config_class(), 0)
    except Exception:  # whatever another library's classes want besides
        return None
    return attention


def _turns_neighbours(attention: nn.Module) -> bool:
    """Whether RoPE turns dims 2p and 2p + 1 as a pair, by the function that its module has for it."""
    rotate = getattr(sys.modules[type(attention).__module__], "rotate_half", None)
    return rotate is not None and rotate(torch.arange(4)).tolist() == [-1, 0, -3, 2]
