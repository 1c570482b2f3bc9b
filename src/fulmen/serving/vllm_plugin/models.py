"""vLLM's own models with the attention of their converted layers swapped (`fulmen.modeling.gqa.model`).

A family's class is made when it is asked for, as an attribute of this module: `models.LlamaDsaForCausalLM`.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import Any, ClassVar

import torch
import vllm
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from vllm.config import VllmConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.utils import maybe_prefix

from fulmen.config import DsaConfig
from fulmen.errors import ConfigError
from fulmen.modeling.families import dsa_family_for
from fulmen.modeling.gqa.model import require_dsa
from fulmen.modeling.text_part import shards_around
from fulmen.modeling.vision import import_vision
from fulmen.modeling.windows import layer_windows
from fulmen.serving.vllm_plugin import HYBRIDS, served_classes, served_with_images
from fulmen.serving.vllm_plugin.attention import DsaAttention
from fulmen.serving.vllm_plugin.coarse_weights import of_coarse_shape, require_coarse_weights
from fulmen.serving.vllm_plugin.hybrids import GatedDsaAttention, compute_float32, named_as_stock
from fulmen.serving.vllm_plugin.products import take_products_from_torch
from fulmen.serving.vllm_plugin.rope import (
    name_query_scaling,
    no_rotation_like,
    require_same_rope,
    scale_longrope,
)
from fulmen.serving.vllm_plugin.stand_in import torchvision_or_nothing
from fulmen.serving.vllm_plugin.weights import pack_experts_anew, watch_head

# The interfaces used here are internal to vLLM and change between its versions.
VLLM_SERIES = "0.32."


class DsaServingMixin:
    """Goes before a vLLM language model: gives its converted layers an indexer and sparse attention.

    Attributes:
        attention_name: of a layer's attention in vLLM's model. attention_class: what takes its place.
    """

    model: Any
    attention_name: ClassVar[str] = "self_attn"
    attention_class: ClassVar[type[DsaAttention]] = DsaAttention

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        dsa, config = _require_servable(vllm_config), vllm_config.model_config
        take_products_from_torch(config.dtype)
        scale_longrope(config.hf_config)
        name_query_scaling(config.hf_config)
        with named_as_stock(config.hf_config):
            super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        stock = [getattr(layer, self.attention_name, None) for layer in self.model.layers]
        require_windows(stock, config.hf_config, config.max_model_len)
        still = dsa_family_for(config.hf_config).layers_without_rope(config.hf_config)
        for layer in dsa.layers:
            block, attention = self.model.layers[layer], stock[layer]
            if attention is not None:
                rotary = attention.rotary_emb
                if layer in still:
                    rotary = no_rotation_like(rotary)
                else:
                    require_same_rope(rotary, config.hf_config, config.max_model_len)
                name = f"{maybe_prefix(prefix, 'model')}.layers.{layer}.{self.attention_name}"
                made = self.attention_class(attention, rotary, layer, dsa, vllm_config, name)
                setattr(block, self.attention_name, made)
        self._coarse, self._is_loaded = dsa.coarse, False
        pack_experts_anew(self)  # type: ignore[arg-type]
        self._head_watch = watch_head(self)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """All weights, or those of a running model that are to be replaced.

        Raises CheckpointError where their index has other levels than the config says.
        """
        loaded = self._load(of_coarse_shape(weights, self._coarse))
        self._head_watch.loaded()
        if not self._is_loaded:
            require_coarse_weights(self)  # type: ignore[arg-type]
        self._is_loaded = True
        return loaded

    def _load(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        if isinstance(self, MistralForCausalLM):
            # It takes any `wq` for one of Mistral's own file format; the indexer has one.
            return LlamaForCausalLM.load_weights(self, weights)
        return super().load_weights(weights)  # type: ignore[misc]


class GptOssDsaAttention(DsaAttention):
    """As vLLM's attention of gpt-oss is named and called."""

    def __init__(self, stock: Any, *given: Any) -> None:
        stock.num_heads, stock.num_kv_heads = stock.num_local_attention_heads, stock.num_local_key_value_heads
        stock.total_num_kv_heads = stock.num_key_value_heads
        super().__init__(stock, *given)

    def forward(self, hidden_states: Tensor, positions: Tensor) -> Tensor:  # type: ignore[override]
        """The same in another order."""
        return super().forward(positions, hidden_states)


class GptOssMixin(DsaServingMixin):
    """Goes before vLLM's gpt-oss, which loads parameters alone: an indexer has buffers, too."""

    attention_name, attention_class = "attn", GptOssDsaAttention

    def _load(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        buffers: dict[str, Tensor] = dict(self.named_buffers())  # type: ignore[attr-defined]
        filled = set[str]()

        def others() -> Iterator[tuple[str, Tensor]]:
            for name, weight in weights:
                own = name.replace(".self_attn.", f".{self.attention_name}.")
                if own in buffers:
                    # While vLLM reloads, one that notes what comes and when a layer is whole.
                    getattr(buffers[own], "weight_loader", default_weight_loader)(buffers[own], weight)
                    filled.add(own)
                else:
                    yield name, weight

        loaded = super()._load(others())
        for layer in self.model.layers:
            if isinstance(attention := getattr(layer, self.attention_name, None), DsaAttention):
                # It holds sinks in float32.
                attention.forget()
        return loaded | filled


class HybridMixin(DsaServingMixin):
    """Goes before vLLM's models with layers of linear attention."""

    lm_head: Any
    attention_class = GatedDsaAttention

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        compute_float32(vllm_config)
        # vLLM's Qwen3-Next would leave a head without weights of its own as it was made.
        tied = vllm_config.model_config.hf_config.tie_word_embeddings
        if tied and isinstance(self.lm_head, ParallelLMHead):
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)


# Of stock classes whose layers are not named, made or loaded as the others'.
MIXINS: dict[str, type[DsaServingMixin]] = {
    "GptOssForCausalLM": GptOssMixin,
    **dict.fromkeys(HYBRIDS, HybridMixin),
}


class TextsAloneMixin:
    """Goes before the language model of one that reads images: it is served by itself, of texts alone.

    The whole model's files have its weights, by other names, and its config has that of the language model.
    """

    # Of a text the three positions of a token are alike: vLLM asks for them where the config names them.
    supports_mrope = True

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        model = vllm_config.model_config
        shards = shards_around(model.model)
        if shards is None:
            raise ConfigError(f"{model.model} is no model that reads images; serve it under its own class")
        text = vllm_config.with_hf_config(shards.family.text_config(model.hf_config))
        self._names = {stored: name for name, stored in shards.stored_names.items()}
        super().__init__(vllm_config=text, prefix=prefix)  # type: ignore[call-arg]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Those of the language model; the vision tower's are left out. Raises as `DsaServingMixin`."""
        inside = ((self._names[name], weight) for name, weight in weights if name in self._names)
        loaded: set[str] = super().load_weights(inside)  # type: ignore[misc]
        return loaded

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: Any) -> tuple[Tensor, int]:
        """[3, T] of a text, and by how much the next position is not T."""
        return torch.arange(len(input_tokens)).expand(3, -1), 0


@cache
def served_class(name: str) -> type:
    """The class of this name: vLLM's own of the stock architecture, with fulmen's attention."""
    with torchvision_or_nothing():
        stock = ModelRegistry.models[_stock_name(name)].load_model_cls()
    about = f"{stock.__name__} with an indexer in the converted layers."
    mixin = MIXINS.get(stock.__name__, DsaServingMixin)
    around = (TextsAloneMixin,) if name in served_with_images() else ()
    return type(name, (*around, mixin, stock), {"__module__": __name__, "__doc__": about})


def _stock_name(name: str) -> str:
    """Of vLLM's own class; for a model that reads images, of its language model."""
    if (reads_images := served_with_images().get(name)) is None:
        return served_classes()[name]
    stock: str = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[import_vision(reads_images).text_type]
    return stock


def __getattr__(name: str) -> type:
    """vLLM looks for a class here by name; only that one's model code is imported."""
    if name not in served_classes() and name not in served_with_images():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return served_class(name)


def require_windows(stock: Sequence[Any], config: PreTrainedConfig, length: int) -> None:
    """Raise ConfigError for a sliding layer that vLLM's code of it lets see more than its window.

    stock: each layer's attention, vLLM's own; None for one on another rank. length: tokens that a request may
    have.
    """
    for number, window in enumerate(layer_windows(config)):
        if window is None or window >= length or stock[number] is None:
            continue
        if stock[number].attn.sliding_window is None:
            raise ConfigError(
                f"layer {number} of model_type {config.model_type!r} sees {window} tokens, and in vLLM all; "
                f"use max_model_len={window} or less, `fulmen chat` or Transformers"
            )


def _require_servable(vllm_config: VllmConfig) -> DsaConfig:
    """The model's DSA part. Raises ConfigError where vLLM's version or settings do not fit it."""
    require_settings(vllm_config)
    return require_dsa(vllm_config.model_config.hf_config)


def require_settings(vllm_config: VllmConfig) -> None:
    """Raise ConfigError for a version of vLLM, or settings of it, that DSA is not served with."""
    if not vllm.__version__.startswith(VLLM_SERIES):
        raise ConfigError(f"vllm {vllm.__version__} is not supported; install vllm {VLLM_SERIES}0")
    cache_dtype = vllm_config.cache_config.cache_dtype
    if cache_dtype not in ("auto", "float32", "bfloat16"):
        raise ConfigError(f"kv_cache_dtype={cache_dtype!r} is not supported with DSA; use 'auto'")
    if str(vllm_config.model_config.dtype) not in ("torch.float32", "torch.bfloat16"):
        raise ConfigError(
            f"dtype={vllm_config.model_config.dtype} is not supported with DSA; use bfloat16 or float32"
        )
    if vllm_config.parallel_config.decode_context_parallel_size > 1:
        raise ConfigError("decode_context_parallel_size above 1 is not supported with DSA; use 1")
