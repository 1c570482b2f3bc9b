"""The indexer that fits a dense model.

Index keys are read for every visible token, so they bound what DSA can save; by default they take a fifth of
the keys and values at most, or in MLA the width that V3.2 has published. Heads follow the model's own, from
which the indexer is built. A coarse level before it is the default where the model's context is long enough
for it to be asked, and it costs less than it spares.
"""

from dataclasses import replace

from transformers import PreTrainedConfig

from fulmen.config import COARSE_FROM, CoarseShape, DsaConfig
from fulmen.errors import ConfigError
from fulmen.modeling.families import family_for, full_attention_layers
from fulmen.modeling.family import Family
from fulmen.modeling.lengths import context_of, default_topk

MAX_INDEX_KEY_SHARE = 0.2
BFLOAT16_BYTES = 2
ONE_LEVEL = CoarseShape(0, 0)


def default_dsa(
    config: PreTrainedConfig,
    topk: int | None = None,
    index_n_heads: int | None = None,
    index_head_dim: int | None = None,
    index: str | None = None,
) -> DsaConfig:
    """The DSA configuration for a dense model; what is given is taken, the rest follows from the model.

    index: "two-level", "one-level", or None: two where they pay (`in_levels`).

    Raises:
        UnsupportedModelError: no family knows the model, or it has no layer to convert.
        AlreadyConvertedError: the model has DSA.
        ConfigError: a given number that cannot be.
    """
    layers = tuple(full_attention_layers(config))
    family = family_for(config)
    default = family.default_index(config, MAX_INDEX_KEY_SHARE)
    one_level = DsaConfig(
        topk=default_topk(config) if topk is None else topk,
        index_n_heads=default.queries if index_n_heads is None else index_n_heads,
        index_n_kv_heads=default.keys,
        index_head_dim=default.width if index_head_dim is None else index_head_dim,
        layers=layers,
    )
    family.require_inheritable(config, one_level)
    return in_levels(one_level, family, config, index)


def in_levels(dsa: DsaConfig, family: Family, config: PreTrainedConfig, index: str | None) -> DsaConfig:
    """`dsa` in the levels that `index` names; None: in two, where a coarse level costs less than it spares.

    config: of the dense or the converted model. Raises ConfigError where two are asked for and cannot be.
    """
    shape = ONE_LEVEL if index == "one-level" else family.default_coarse(config)
    if index == "two-level" and not shape.width:
        raise ConfigError(f"index={index!r} is not for model_type {config.model_type!r}; leave it out")
    found = _with_coarse(dsa, shape)
    if index is None and shape.width and not _pays(found, family, config):
        return _with_coarse(dsa, ONE_LEVEL)
    return found


def one_level_reason(dsa: DsaConfig, config: PreTrainedConfig) -> str | None:
    """Why a dense model would get one level where its family has two by default; None: it would not."""
    if dsa.coarse_head_dim or not family_for(config).default_coarse(config).width:
        return None
    if not _is_asked(dsa, config):
        return f"a coarse one is asked beyond {_asked_from(dsa):,} tokens, which its context does not have"
    return "its heads are so small that a coarse level would cost as much as it spares"


def _with_coarse(dsa: DsaConfig, shape: CoarseShape) -> DsaConfig:
    return replace(dsa, coarse_head_dim=shape.width, coarse_n_heads=shape.heads)


def _asked_from(dsa: DsaConfig) -> int:
    return COARSE_FROM * dsa.candidate_factor * dsa.topk


def _is_asked(dsa: DsaConfig, config: PreTrainedConfig) -> bool:
    """Whether texts within the context are long enough for a coarse level to choose candidates."""
    context = context_of(config)
    return context is None or context > _asked_from(dsa)


def _pays(dsa: DsaConfig, family: Family, config: PreTrainedConfig) -> bool:
    """Whether the coarse level is asked, and reads and computes less for a key than the indexer."""
    cost = family.indexer_cost(config, dsa)
    smaller = family.coarse_key_bytes(dsa) < family.index_key_bytes(dsa, BFLOAT16_BYTES)
    return _is_asked(dsa, config) and smaller and cost.coarse_pair_flops < cost.pair_flops
