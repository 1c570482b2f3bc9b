"""What inherit takes, from the config alone: memory with the whole model or one layer of it, and operations.

Estimates: of the memory what is large is counted, of the operations the products of matrices and, for all
else, as many of float32 as its time is worth. Where layers share k there are, beside the pass that builds the
indexers, one over some of the texts that builds them too, to see what they miss, and the trial of splits.
"""

import copy
from typing import NamedTuple

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from fulmen.config import DsaConfig
from fulmen.modeling.cost import indexer_cost, prefill_cost
from fulmen.modeling.families import family_like
from fulmen.modeling.gqa.topk_ratios import ratios_to_try
from fulmen.modeling.gqa.topk_trial import TEXT_ROWS, TRIED_BLENDS
from fulmen.modeling.token_blocks import TOKENS_PER_BLOCK

# Python and the libraries.
PROGRAM_BYTES = 700 * 2**20
# What a layer keeps of a token in numbers of the model's own: hidden states, queries, keys and values.
STATES, QUERIES, KEYS = 5, 4, 3
# Queries of which logits to all keys are there at once, and how often (float32).
PAIR_ROWS, PAIR_COPIES = 48, 4
# Matrices of hidden size by hidden size that the regression of the thresholds holds (float64).
RIDGE_COPIES = 3
# Copies of the trial's logits that are there at once (float32).
TRIAL_COPIES = 5
# The fit of one layer and sequence takes as long as the products, in float32, of this many queries with all
# of its keys and values; norms, rotations and the like, for each number, as long as this many operations.
FIT_QUERIES, NUMBER_FLOPS = 5000, 370


class WeightSizes(NamedTuple):
    """Numbers of weights: all, and those of the largest decoder layer."""

    model: int
    layer: int


class InheritTexts(NamedTuple):
    """What is read.

    sequences: of `length` tokens, to calibrate on. shared: of those, to share k by. tried: of `tried_length`
    tokens, to try its splits with.
    """

    sequences: int
    length: int
    shared: int
    tried: int
    tried_length: int


class InheritCost(NamedTuple):
    """Peak memory in bytes, with the whole model and layer by layer; floating-point operations.

    flops: of products in the model's dtype. float32_flops: as many in float32 as all else is worth.
    """

    whole_bytes: int
    layers_bytes: int
    flops: float
    float32_flops: float


def weight_sizes(config: PreTrainedConfig) -> WeightSizes:
    """Of the dense model with this config; no weight is made."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    layers = [layer for some in lists if len(some) == config.num_hidden_layers for layer in some]
    largest = max(sum(x.numel() for x in layer.parameters()) for layer in layers)
    return WeightSizes(model.num_parameters(), largest)


def inherit_cost(
    config: PreTrainedConfig, dsa: DsaConfig, sizes: WeightSizes, texts: InheritTexts, itemsize: int
) -> InheritCost:
    """Of inherit with these texts. itemsize: bytes of a weight."""
    index = indexer_cost(config, dsa)
    indexer = index.key_weights + index.query_weights
    once = PROGRAM_BYTES + max(_fit_bytes(config, texts, itemsize), _trial_bytes(config, texts, itemsize))
    readings = _readings(config, dsa, texts)
    width = _numbers(config) + 3 * _feed_forward_width(config)
    numbers = sum(tokens for tokens, _ in readings) * config.num_hidden_layers * width
    pair_flops = family_like(config).prefill_layout(config).pair_flops
    fits = texts.sequences + (texts.shared if _shares_k(config, dsa, texts) else 0)
    return InheritCost(
        whole_bytes=once + (sizes.model + indexer * len(dsa.layers)) * itemsize,
        layers_bytes=once + (2 * sizes.layer + indexer) * itemsize,
        flops=sum(
            tokens * prefill_cost(config, dsa, max(1, length // 2), itemsize).dense_flops
            for tokens, length in readings
        ),
        float32_flops=NUMBER_FLOPS * numbers
        + fits * len(dsa.layers) * FIT_QUERIES * texts.length * pair_flops,
    )


def _readings(config: PreTrainedConfig, dsa: DsaConfig, texts: InheritTexts) -> list[tuple[int, int]]:
    """Tokens that are read, and the length of the texts that they are of."""
    found = [(texts.sequences * texts.length, texts.length)]
    if _shares_k(config, dsa, texts):
        found.append((texts.shared * texts.length, texts.length))
    if family_like(config).varies_topk:
        # Densely, and with each of the splits.
        found.append(((1 + len(TRIED_BLENDS)) * texts.tried * texts.tried_length, texts.tried_length))
    return found


def _shares_k(config: PreTrainedConfig, dsa: DsaConfig, texts: InheritTexts) -> bool:
    return family_like(config).varies_topk and bool(ratios_to_try(texts.length, dsa.topk))


def _numbers(config: PreTrainedConfig) -> int:
    """That a layer keeps of a token, in the model's dtype."""
    layout = family_like(config).prefill_layout(config)
    heads = QUERIES * layout.heads * layout.key_width + KEYS * layout.key_heads * layout.key_width
    return STATES * config.hidden_size + heads


def _fit_bytes(config: PreTrainedConfig, texts: InheritTexts, itemsize: int) -> int:
    """Beside the weights, while indexers are built; to share k takes no more, as it reads no other texts."""
    layout = family_like(config).prefill_layout(config)
    # Of a token, its keys in float32 too.
    token = _numbers(config) * itemsize + 4 * layout.key_heads * layout.key_width
    pairs = 4 * PAIR_COPIES * PAIR_ROWS * layout.heads * texts.length
    ridge = 8 * RIDGE_COPIES * config.hidden_size**2
    return texts.sequences * texts.length * token + _feed_forward_bytes(config, itemsize) + pairs + ridge


def _trial_bytes(config: PreTrainedConfig, texts: InheritTexts, itemsize: int) -> int:
    """Beside the weights, while splits are tried, one text after the other."""
    if not family_like(config).varies_topk:
        return 0
    states = texts.tried_length * _numbers(config) * itemsize
    logits = 4 * TRIAL_COPIES * TEXT_ROWS * config.vocab_size
    return states + logits + _feed_forward_bytes(config, itemsize)


def _feed_forward_bytes(config: PreTrainedConfig, itemsize: int) -> int:
    return 3 * TOKENS_PER_BLOCK * _feed_forward_width(config) * itemsize


def _feed_forward_width(config: PreTrainedConfig) -> int:
    """0 for a config without: where all layers have experts."""
    return getattr(config, "intermediate_size", None) or 0
