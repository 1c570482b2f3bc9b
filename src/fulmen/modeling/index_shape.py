"""The indexer that fits a dense model.

Index keys are read for every visible token, so they bound what DSA can save; by default they take a fifth of
the keys and values at most, or in MLA the width that V3.2 has published. Heads follow the model's own, from
which the indexer is built.
"""

from transformers import PreTrainedConfig

from fulmen.config import CoarseShape, DsaConfig
from fulmen.errors import ConfigError
from fulmen.modeling.families import family_for, full_attention_layers
from fulmen.modeling.family import Family
from fulmen.modeling.lengths import default_topk

MAX_INDEX_KEY_SHARE = 0.2


def default_dsa(
    config: PreTrainedConfig,
    topk: int | None = None,
    index_n_heads: int | None = None,
    index_head_dim: int | None = None,
    index: str | None = None,
) -> DsaConfig:
    """The DSA configuration for a dense model; what is given is taken, the rest follows from the model.

    index: "two-level", "one-level" or None, which is the latter.

    Raises:
        UnsupportedModelError: no family knows the model, or it has no layer to convert.
        AlreadyConvertedError: the model has DSA.
        ConfigError: a given number that cannot be.
    """
    layers = tuple(full_attention_layers(config))
    family = family_for(config)
    coarse = coarse_shape(family, config, index)
    default = family.default_index(config, MAX_INDEX_KEY_SHARE)
    dsa = DsaConfig(
        topk=default_topk(config) if topk is None else topk,
        index_n_heads=default.queries if index_n_heads is None else index_n_heads,
        index_n_kv_heads=default.keys,
        index_head_dim=default.width if index_head_dim is None else index_head_dim,
        layers=layers,
        coarse_head_dim=coarse.width,
        coarse_n_heads=coarse.heads,
    )
    family.require_inheritable(config, dsa)
    return dsa


def coarse_shape(family: Family, config: PreTrainedConfig, index: str | None) -> CoarseShape:
    """Of no width: one level. Raises ConfigError where two are asked for and cannot be."""
    shape = family.default_coarse(config) if index == "two-level" else CoarseShape(0, 0)
    if index == "two-level" and not shape.width:
        raise ConfigError(f"index={index!r} is not for model_type {config.model_type!r}; leave it out")
    return shape
