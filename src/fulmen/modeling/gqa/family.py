"""Families with grouped heads (GQA), whose DSA classes are fulmen's own."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from fulmen.config import CoarseShape, DsaConfig
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
from fulmen.modeling.gqa.cache import DsaCache
from fulmen.modeling.gqa.convert import convert_gqa, dsa_config_for, plain_config
from fulmen.modeling.gqa.indexer import model_head_width
from fulmen.modeling.gqa.inherit import InheritedGqaLayer, inherit_coarse_gqa, inherit_gqa
from fulmen.modeling.gqa.model import set_topk_ratios
from fulmen.modeling.gqa.topk_ratios import fit_topk_ratios
from fulmen.modeling.gqa.topk_trial import try_topk_ratios
from fulmen.modeling.lengths import short_text_topk
from fulmen.modeling.selectors import dsa_attentions
from fulmen.modeling.windows import full_layers
from fulmen.ops.common.index_keys import SCALE_BYTES

# Dims of a coarse head. The least chose nearly as well as twice as many (docs/log.md); the most are a row of
# a matrix tile.
LEAST_COARSE, MOST_COARSE = 24, 64


@dataclass(frozen=True)
class GqaFamily(Family):
    """A family whose DSA classes stand in its file; `gqa_family` makes it from the last of them.

    Attributes:
        project: `(attention, x_BTC) -> q_BTHD, k_BTGD, v_BTGD` after bias or norm and before RoPE, and the
            gate if there is one; takes the dense and the DSA attention module.
        turns: `(config, layer)`: whether RoPE turns the heads of a layer.
        config_class, model_class, causal_lm_class: the DSA classes.
        source_class: the stock language model.
        gated: the attention's output has a gate, as wide as the queries.
    """

    project: Callable[..., tuple[Tensor, ...]]
    turns: Callable[[Any, int], bool]
    config_class: type[PreTrainedConfig]
    model_class: type[PreTrainedModel]
    causal_lm_class: type[PreTrainedModel]
    source_class: type[PreTrainedModel]
    gated: bool = field(default=False, kw_only=True)

    varies_topk: ClassVar[bool] = True
    packs_index_keys: ClassVar[bool] = True

    @property
    def auto_classes(self) -> dict[str, type]:
        """The DSA classes by the auto class that finds each."""
        return {
            "AutoConfig": self.config_class,
            "AutoModel": self.model_class,
            "AutoModelForCausalLM": self.causal_lm_class,
        }

    def has_layout(self, config: PreTrainedConfig) -> bool:
        return getattr(config, "kv_lora_rank", None) is None

    def attention_layout(self, config: PreTrainedConfig) -> AttentionLayout:
        width, heads = model_head_width(config), config.num_attention_heads
        return AttentionLayout(heads, config.num_key_value_heads, width, width, False, _scale(config))

    def layers_without_rope(self, config: PreTrainedConfig) -> list[int]:
        return [layer for layer in range(config.num_hidden_layers) if not self.turns(config, layer)]

    def attention_weights(self, config: PreTrainedConfig) -> int:
        heads, key_heads = config.num_attention_heads, config.num_key_value_heads
        hidden: int = config.hidden_size
        return hidden * ((2 + self.gated) * heads + 2 * key_heads) * model_head_width(config)

    def heads_in_words(self, config: PreTrainedConfig) -> str:
        return (
            f"{config.num_attention_heads} query, {config.num_key_value_heads} key/value, "
            f"width {model_head_width(config)}"
        )

    def indexer_cost(self, config: PreTrainedConfig, dsa: DsaConfig) -> IndexerCost:
        head, queries = model_head_width(config), dsa.index_n_heads * dsa.index_head_dim
        keys = dsa.index_n_kv_heads * dsa.index_head_dim + dsa.coarse_head_dim
        query_weights = config.num_attention_heads * head * queries
        query_weights += 2 * config.hidden_size * dsa.index_n_heads
        coarse_heads = dsa.coarse.query_heads
        query_weights += config.num_attention_heads * head * coarse_heads * dsa.coarse_head_dim
        query_weights += config.hidden_size * coarse_heads
        pair_flops = 2 * dsa.index_n_heads * (dsa.index_head_dim + 1)
        coarse_pair_flops = 2 * coarse_heads * (dsa.coarse_head_dim + 1)
        key_weights = config.num_key_value_heads * head * keys
        return IndexerCost(pair_flops, key_weights, query_weights, coarse_pair_flops)

    def index_key_bytes(self, dsa: DsaConfig, dtype_bytes: int) -> int:
        """Eight bits a number and a scale, whatever the model's dtype."""
        return dsa.index_n_kv_heads * (dsa.index_head_dim + SCALE_BYTES)

    def coarse_key_bytes(self, dsa: DsaConfig) -> int:
        return dsa.coarse_head_dim + SCALE_BYTES if dsa.coarse_head_dim else 0

    def default_index(self, config: PreTrainedConfig, key_share: float) -> IndexHeads:
        """One index head per attention head, one index key head per key/value head."""
        heads, key_heads = config.num_attention_heads, config.num_key_value_heads
        kv_bytes = 2 * self.attention_layout(config).token_width
        return IndexHeads(
            heads, key_heads, even_width(int(key_share * kv_bytes / key_heads) - SCALE_BYTES, 2)
        )

    def default_coarse(self, config: PreTrainedConfig) -> CoarseShape:
        """As many heads as the model has, so that each has its threshold, of a thirty-second of the bytes of
        keys and values, within 24 and 64 dims, if there are as many.
        """
        kv_bytes = 2 * self.attention_layout(config).token_width
        heads = config.num_key_value_heads * model_head_width(config)
        width = min(even_width(min(kv_bytes // 32, MOST_COARSE), LEAST_COARSE), heads - heads % 2)
        return CoarseShape(config.num_attention_heads, width)

    def require_inheritable(self, config: PreTrainedConfig, dsa: DsaConfig) -> None:
        """Index heads are made of attention heads, and index dims of the model's rotary pairs."""
        heads, width = config.num_attention_heads, model_head_width(config)
        if dsa.index_head_dim > width:
            raise ConfigError(
                f"index_head_dim={dsa.index_head_dim} is more than the model's head width {width}, "
                f"from which it takes its rotary pairs; use {width} or less"
            )
        if heads % dsa.index_n_heads:
            raise ConfigError(
                f"index_n_heads={dsa.index_n_heads} does not divide the model's {heads} attention heads, "
                f"each of which is to be in one; use {heads} or a divisor of it"
            )
        key_heads = config.num_key_value_heads
        if dsa.coarse_n_heads and (heads % dsa.coarse_n_heads or dsa.coarse_n_heads % key_heads):
            raise ConfigError(
                f"coarse_n_heads={dsa.coarse_n_heads} does not fit {heads} heads on {key_heads} key heads; "
                f"use {heads}, {key_heads}, or a multiple of {key_heads} that divides {heads}"
            )
        if dsa.coarse_head_dim > (most := key_heads * width):
            raise ConfigError(
                f"coarse_head_dim={dsa.coarse_head_dim} is more than the {most} dims of the key heads, "
                f"which it mixes; use {most - most % 2} or less"
            )

    def require_convertible(self, config: PreTrainedConfig, dsa: DsaConfig) -> None:
        """Whatever `DsaConfig` allows has room in a config of fulmen's own."""

    def from_dense(self, dense: PreTrainedModel, dsa: DsaConfig) -> PreTrainedModel:
        """`convert_gqa`: the weights are shared, not copied."""
        return convert_gqa(dense, dsa, self.config_class, self.causal_lm_class)

    def dsa_config(self, config: PreTrainedConfig, dsa: DsaConfig, tied: bool) -> PreTrainedConfig:
        return dsa_config_for(config, dsa, tied, self.config_class)

    def dense_config(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """The stock config inside that of a converted model."""
        values = plain_config(config)
        del values["dsa"]
        stock: Any = self.source_class
        dense: PreTrainedConfig = stock.config_class.from_dict(values)
        return dense

    def dsa_of(self, config: PreTrainedConfig) -> DsaConfig:
        return DsaConfig.from_dict(config.dsa)

    def set_topk(self, model: PreTrainedModel, topk: int) -> None:
        """Where layers share the budget unevenly (`DsaConfig.topk_shares`), `topk` is their mean."""
        config = model.config.get_text_config()
        config.dsa = {**config.dsa, "topk": topk}

    def fit_topk(
        self, model: PreTrainedModel, input_ids_BT: Tensor, on_layer: Callable[[int], None] = lambda _: None
    ) -> None:
        set_topk_ratios(model, fit_topk_ratios(model, input_ids_BT, self.dsa_of(model.config).topk, on_layer))

    def try_topk(
        self,
        model: PreTrainedModel,
        texts: Sequence[AnsweredText],
        on_read: Callable[[int, int], None] = lambda done, total: None,
    ) -> list[TriedSplit]:
        topk, fitted = self.dsa_of(model.config).topk, self.dsa_of(model.config).topk_shares
        if not texts or len(set(fitted)) < 2:
            return []
        self.set_topk(model, min(short_text_topk(topk, len(text.ids_T)) for text in texts))
        try:
            return try_topk_ratios(model, texts, on_read)
        finally:
            self.set_topk(model, topk)

    def restore_topk(self, model: PreTrainedModel, layers: Sequence[Mapping[str, Any]]) -> None:
        set_topk_ratios(model, [layer["topk_share"] for layer in layers])

    def inherit(
        self,
        model: PreTrainedModel,
        input_ids_BT: Tensor,
        on_layer: Callable[[InheritedGqaLayer], None] = lambda _: None,
    ) -> list[InheritedGqaLayer]:
        """`inherit_gqa`. Raises as that does."""
        return inherit_gqa(model, input_ids_BT, self.dsa_of(model.config).topk, on_layer)

    def set_coarse(self, model: PreTrainedModel, dsa: DsaConfig) -> None:
        """The shapes of `dsa`; its weights are random until `inherit_coarse` has computed them."""
        model.config.dsa = dsa.to_dict()
        for attention in dsa_attentions(model):
            attention.indexer.set_coarse(dsa.coarse)

    def inherit_coarse(
        self, model: PreTrainedModel, input_ids_BT: Tensor, on_layer: Callable[[int], None] = lambda _: None
    ) -> None:
        inherit_coarse_gqa(model, input_ids_BT, self.dsa_of(model.config).topk, on_layer)

    def accelerate(self, model: PreTrainedModel) -> None:
        """Its attention is fulmen's own already."""

    def accelerated(self, model: PreTrainedModel) -> AbstractContextManager[Any]:
        return nullcontext()

    def empty_cache(self, config: PreTrainedConfig, max_length: int | None = None) -> DsaCache:
        return DsaCache(config, max_length)


def gqa_family(causal_lm_class: Any, mlp_matrices: int = 3, gated: bool = False) -> GqaFamily:
    """The family of a DSA language model (`dsa_classes`): its class leads to all others.

    mlp_matrices: as in `Family`; gated: as in `GqaFamily`.
    """
    model_class, source_class = causal_lm_class.model_class, causal_lm_class.__bases__[-1]

    def full_attention_layers(config: PreTrainedConfig) -> list[int]:
        model_class.require(config)
        return full_layers(config)

    return GqaFamily(
        source_types=(source_class.config_class.model_type,),
        dsa_types=(causal_lm_class.config_class.model_type,),
        serving_classes=(causal_lm_class.__name__,),
        full_attention_layers=full_attention_layers,
        project=model_class.attention_class.project,
        turns=model_class.attention_class.turns,
        config_class=causal_lm_class.config_class,
        model_class=model_class,
        causal_lm_class=causal_lm_class,
        source_class=source_class,
        mlp_matrices=mlp_matrices,
        gated=gated,
    )


def _scale(config: PreTrainedConfig) -> float:
    """Granite says what the logits are multiplied with, Gemma whose root divides them: else the width's."""
    multiplier: float | None = getattr(config, "attention_multiplier", None)
    if multiplier is not None:
        return multiplier
    return (getattr(config, "query_pre_attn_scalar", None) or model_head_width(config)) ** -0.5
