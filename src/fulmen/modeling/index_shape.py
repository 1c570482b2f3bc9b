"""The indexer's shape: the one a model has, or the one that fits it.

Index keys are read for every visible token, so they bound what DSA can save; by default they take a fifth of
the keys and values at most. One index key head per key/value head and one index head per attention head let
the indexer start from the model's own heads (`fulmen.modeling.gqa.inherit`).
"""

import sys

from transformers import PreTrainedConfig

from fulmen.config import DsaConfig
from fulmen.errors import ConfigError
from fulmen.modeling.cost import attention_shape, is_mla
from fulmen.modeling.families import dsa_family_for, full_attention_layers
from fulmen.ops.common.index_keys import SCALE_BYTES

MAX_INDEX_KEY_SHARE = 0.2
# V3.2's own k at 64K and more; below that one token in 32, and never so few that the local text fills it.
SMALLEST_TOPK, LARGEST_TOPK, CONTEXT_OVER_TOPK = 256, 2048, 32
MAX_MLA_INDEX_HEADS = 64
# Of a text that teaches an indexer: three of four queries then have more to choose from than they keep.
LENGTH_OVER_TOPK, USUAL_LENGTH = 4, 2048


def default_dsa(
    config: PreTrainedConfig,
    topk: int | None = None,
    index_n_heads: int | None = None,
    index_head_dim: int | None = None,
) -> DsaConfig:
    """The DSA configuration for a dense model; what is given is taken, the rest follows from the model.

    Raises:
        UnsupportedModelError: no family knows the model, or it has no layer to convert.
        AlreadyConvertedError: the model has DSA.
        ConfigError: a given number that cannot be.
    """
    layers = tuple(full_attention_layers(config))
    heads, groups = config.num_attention_heads, 1 if is_mla(config) else config.num_key_value_heads
    most_heads = MAX_MLA_INDEX_HEADS if is_mla(config) else heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    if index_head_dim is not None and index_head_dim > head_dim and not is_mla(config):
        raise ConfigError(
            f"index_head_dim={index_head_dim} is more than the model's head width {head_dim}, "
            f"from which it takes its rotary pairs; use {head_dim} or less"
        )
    dsa = DsaConfig(
        topk=default_topk(config) if topk is None else topk,
        index_n_heads=min(heads, most_heads) if index_n_heads is None else index_n_heads,
        index_n_kv_heads=groups,
        index_head_dim=_default_head_dim(config, groups) if index_head_dim is None else index_head_dim,
        layers=layers,
    )
    _require_inheritable(config, dsa)
    return dsa


def context_of(config: PreTrainedConfig) -> int | None:
    """Tokens that the model was made for; None if its config does not say."""
    return getattr(config, "max_position_embeddings", None)


def default_topk(config: PreTrainedConfig) -> int:
    """A 32nd of the model's context, within 256 and 2048 tokens, and half of it at most."""
    context = context_of(config)
    if context is None:
        return SMALLEST_TOPK
    within = max(SMALLEST_TOPK, min(LARGEST_TOPK, context // CONTEXT_OVER_TOPK))
    return max(1, min(within, context // 2))


def default_length(config: PreTrainedConfig, topk: int) -> int:
    """Tokens of a text to calibrate on, to train on or to judge with, where nobody says how many.

    Four times k, as a text that is not well above k leaves nothing to select; at least 2,048, and within the
    model's context.
    """
    return usual_length(topk, context_of(config))


def usual_length(topk: int, context: int | None) -> int:
    """`default_length`, where the context is known; None: it is not."""
    return min(max(USUAL_LENGTH, LENGTH_OVER_TOPK * topk), context or sys.maxsize)


def _require_inheritable(config: PreTrainedConfig, dsa: DsaConfig) -> None:
    """Raise ConfigError for an indexer that cannot be built from the model's own heads."""
    heads, rotary = config.num_attention_heads, getattr(config, "qk_rope_head_dim", 0)
    if is_mla(config):
        if dsa.index_head_dim < rotary + 2:
            raise ConfigError(
                f"index_head_dim={dsa.index_head_dim} leaves no room beside the model's {rotary} rotary "
                f"dims; use {rotary + 2} or more"
            )
    elif heads % dsa.index_n_heads:
        raise ConfigError(
            f"index_n_heads={dsa.index_n_heads} does not divide the model's {heads} attention heads, each "
            f"of which is to be in one; use {heads} or a divisor of it"
        )


def dsa_of(config: PreTrainedConfig) -> DsaConfig:
    """The DSA configuration of a converted model. Raises UnsupportedModelError if it is not one."""
    dsa_family_for(config)
    if getattr(config, "dsa", None):
        return DsaConfig.from_dict(config.dsa)
    layers = tuple(range(config.num_hidden_layers))
    return DsaConfig(config.index_topk, config.index_n_heads, 1, config.index_head_dim, layers)


def _default_head_dim(config: PreTrainedConfig, groups: int) -> int:
    """The widest index head within the share, a multiple of 8 where that leaves any."""
    kv_width = attention_shape(config).token_width
    # bfloat16 keys and values; a GQA indexer's keys take one byte a number and a scale.
    widest = int(MAX_INDEX_KEY_SHARE * 2 * kv_width / groups) - SCALE_BYTES
    if is_mla(config):
        widest = int(MAX_INDEX_KEY_SHARE * kv_width)
    # An MLA index head holds the rotary key, one direction of the latent and the constant 1 at least.
    narrowest = config.qk_rope_head_dim + 2 if is_mla(config) else 2
    return max(narrowest, widest - widest % (8 if widest >= 8 else 2))
