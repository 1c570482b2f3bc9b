"""Families with multi-head latent attention (MLA), whose DSA classes are Transformers' own."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from transformers import DeepseekV32ForCausalLM, PreTrainedConfig, PreTrainedModel

from fulmen.config import DsaConfig
from fulmen.errors import ConfigError
from fulmen.modeling.family import (
    AnsweredText,
    AttentionLayout,
    Family,
    IndexerCost,
    IndexHeads,
    TriedSplit,
    even_width,
)
from fulmen.modeling.gqa.convert import plain_config
from fulmen.modeling.mla.attention import accelerate_mla, fulmen_attention
from fulmen.modeling.mla.cache import MlaCache
from fulmen.modeling.mla.convert import convert_mla, require_mla_config
from fulmen.modeling.mla.inherit import InheritedMlaLayer, inherit_mla
from fulmen.modeling.mla.published import is_published_in_fp8, published_indexers

MAX_INDEX_HEADS = 64


@dataclass(frozen=True)
class MlaFamily(Family):
    """A family whose DSA class is stock: one index key head, no shift, an indexer in every layer."""

    is_stock: ClassVar[bool] = True
    causal_lm_class: ClassVar[Any] = DeepseekV32ForCausalLM

    def has_layout(self, config: PreTrainedConfig) -> bool:
        return getattr(config, "kv_lora_rank", None) is not None

    def attention_layout(self, config: PreTrainedConfig) -> AttentionLayout:
        """Absorbed: one key head [latent, rotary key] serves all heads, and the latent is its value."""
        latent, rotary = config.kv_lora_rank, config.qk_rope_head_dim
        scale = (config.qk_nope_head_dim + rotary) ** -0.5
        return AttentionLayout(config.num_attention_heads, 1, latent + rotary, latent, True, scale)

    def prefill_layout(self, config: PreTrainedConfig) -> AttentionLayout:
        """Expanded: each head's own keys and values."""
        heads, width = config.num_attention_heads, config.qk_nope_head_dim + config.qk_rope_head_dim
        return AttentionLayout(heads, heads, width, config.v_head_dim, False, width**-0.5)

    def attention_weights(self, config: PreTrainedConfig) -> int:
        heads, hidden, latent = config.num_attention_heads, config.hidden_size, config.kv_lora_rank
        q_rank, q_width = config.q_lora_rank, heads * (config.qk_nope_head_dim + config.qk_rope_head_dim)
        q_weights = q_rank * (hidden + q_width) if q_rank else hidden * q_width
        down_weights = hidden * (latent + config.qk_rope_head_dim)
        up_weights = latent * heads * (config.qk_nope_head_dim + config.v_head_dim)
        weights: int = q_weights + down_weights + up_weights + heads * config.v_head_dim * hidden
        return weights

    def heads_in_words(self, config: PreTrainedConfig) -> str:
        return (
            f"{config.num_attention_heads} query; MLA: latent {config.kv_lora_rank}, "
            f"widths {config.qk_nope_head_dim} + {config.qk_rope_head_dim} rotary"
        )

    def indexer_cost(self, config: PreTrainedConfig, dsa: DsaConfig) -> IndexerCost:
        hidden, queries = config.hidden_size, dsa.index_n_heads * dsa.index_head_dim
        query_weights = (config.q_lora_rank or hidden) * queries + hidden * dsa.index_n_heads
        pair_flops = 2 * dsa.index_n_heads * (dsa.index_head_dim + 1)
        return IndexerCost(pair_flops, hidden * dsa.index_n_kv_heads * dsa.index_head_dim, query_weights)

    def index_key_bytes(self, dsa: DsaConfig, dtype_bytes: int) -> int:
        return dsa.index_head_dim * dtype_bytes

    def default_index(self, config: PreTrainedConfig, key_share: float) -> IndexHeads:
        """As published (V3.2: 64 heads of 128 dims): the rotary key, and as many dims of the latent and for
        the constant 1, whatever they take.
        """
        heads = min(config.num_attention_heads, MAX_INDEX_HEADS)
        return IndexHeads(heads, 1, even_width(2 * config.qk_rope_head_dim, config.qk_rope_head_dim + 2))

    def require_inheritable(self, config: PreTrainedConfig, dsa: DsaConfig) -> None:
        """An index key holds the model's rotary key, and more."""
        rotary = config.qk_rope_head_dim
        if dsa.index_head_dim < rotary + 2:
            raise ConfigError(
                f"index_head_dim={dsa.index_head_dim} leaves no room beside the model's {rotary} rotary "
                f"dims; use {rotary + 2} or more"
            )

    def require_convertible(self, config: PreTrainedConfig, dsa: DsaConfig) -> None:
        """Raises ConfigError where the stock format has no room for `dsa`, and as `require_mla_config`."""
        if dsa.index_n_kv_heads != 1:
            raise ConfigError(f"index_n_kv_heads={dsa.index_n_kv_heads} is not in deepseek_v32; use 1")
        if list(dsa.layers) != self.full_attention_layers(config):
            raise ConfigError(
                f"layers={list(dsa.layers)} is not in deepseek_v32; convert all {config.num_hidden_layers}"
            )
        require_mla_config(config, dsa.topk, dsa.index_n_heads, dsa.index_head_dim)

    def from_dense(self, dense: PreTrainedModel, dsa: DsaConfig) -> DeepseekV32ForCausalLM:
        """`convert_mla`. Raises as `require_convertible`."""
        self.require_convertible(dense.config, dsa)
        return convert_mla(
            dense, topk=dsa.topk, index_n_heads=dsa.index_n_heads, index_head_dim=dsa.index_head_dim
        )

    def runs_as_stored(self, config: PreTrainedConfig) -> bool:
        """Not where `convert_mla` changes weights."""
        kept = config.q_lora_rank is not None and getattr(config, "rope_interleave", True)
        return bool(kept) and super().runs_as_stored(config)

    def dsa_config(self, config: PreTrainedConfig, dsa: DsaConfig, tied: bool) -> PreTrainedConfig:
        """With all that the source's config says besides, by which vLLM reads DeepSeek's files."""
        own = require_mla_config(config, dsa.topk, dsa.index_n_heads, dsa.index_head_dim)
        own.tie_word_embeddings = tied
        known = own.to_dict()
        for key, value in plain_config(config).items():
            if key not in known:
                setattr(own, key, value)
        return own

    def quantizes_indexers(self, settings: Mapping[str, Any]) -> bool:
        return is_published_in_fp8(settings)

    def stored_indexers(self, state: Mapping[str, Tensor], settings: Mapping[str, Any]) -> dict[str, Tensor]:
        if not is_published_in_fp8(settings):
            return dict(state)
        return published_indexers(state, settings)

    def dsa_of(self, config: PreTrainedConfig) -> DsaConfig:
        layers = tuple(range(config.num_hidden_layers))
        return DsaConfig(config.index_topk, config.index_n_heads, 1, config.index_head_dim, layers)

    def set_topk(self, model: PreTrainedModel, topk: int) -> None:
        model.config.index_topk = topk
        for module in model.modules():
            if isinstance(getattr(module, "index_topk", None), int):
                setattr(module, "index_topk", topk)  # noqa: B010

    def fit_topk(
        self, model: PreTrainedModel, input_ids_BT: Tensor, on_layer: Callable[[int], None] = lambda _: None
    ) -> None:
        """All layers keep `index_topk`: the stock format has one."""

    def try_topk(
        self,
        model: PreTrainedModel,
        texts: Sequence[AnsweredText],
        on_read: Callable[[int, int], None] = lambda done, total: None,
    ) -> list[TriedSplit]:
        """As `fit_topk`."""
        return []

    def restore_topk(self, model: PreTrainedModel, layers: Sequence[Mapping[str, Any]]) -> None:
        """As `fit_topk`."""

    def inherit(
        self,
        model: PreTrainedModel,
        input_ids_BT: Tensor,
        on_layer: Callable[[InheritedMlaLayer], None] = lambda _: None,
    ) -> list[InheritedMlaLayer]:
        """`inherit_mla`. Raises as that does."""
        return inherit_mla(model, input_ids_BT, on_layer)

    def empty_cache(self, config: PreTrainedConfig, max_length: int | None = None) -> MlaCache:
        return MlaCache(config, max_length)

    def accelerate(self, model: PreTrainedModel) -> None:
        """`accelerate_mla`."""
        accelerate_mla(model)

    def accelerated(self, model: PreTrainedModel) -> AbstractContextManager[Any]:
        """`fulmen_attention`: until the block ends, unless the model is accelerated already."""
        return fulmen_attention(model)
