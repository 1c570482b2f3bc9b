"""What inherit takes, from the config alone: memory with the whole model or one layer of it, and operations.

Estimates: of the memory what is large is counted, of the operations the products of matrices and, for the fit
of the indexers, as many as its time is worth.
"""

import copy
from typing import NamedTuple

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from fulmen.config import DsaConfig
from fulmen.modeling.cost import indexer_cost, prefill_cost
from fulmen.modeling.families import family_like
from fulmen.modeling.token_blocks import TOKENS_PER_BLOCK

# Python and the libraries.
PROGRAM_BYTES = 700 * 2**20
# What a layer keeps of a token in numbers of the model's own: hidden states, queries, keys and values.
STATES, QUERIES, KEYS = 5, 4, 3
# Queries of which logits to all keys are there at once, and how often (float32).
PAIR_ROWS, PAIR_COPIES = 48, 4
# Matrices of hidden size by hidden size that the regression of the thresholds holds (float64).
RIDGE_COPIES = 3
# The fit of one layer and sequence costs as much as this many queries attending to all of it.
FIT_QUERIES = 9000


class WeightSizes(NamedTuple):
    """Numbers of weights: all, and those of the largest decoder layer."""

    model: int
    layer: int


class InheritCost(NamedTuple):
    """Peak memory in bytes, with the whole model and layer by layer; floating-point operations."""

    whole_bytes: int
    layers_bytes: int
    flops: float


def weight_sizes(config: PreTrainedConfig) -> WeightSizes:
    """Of the dense model with this config; no weight is made."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    layers = [layer for some in lists if len(some) == config.num_hidden_layers for layer in some]
    largest = max(sum(x.numel() for x in layer.parameters()) for layer in layers)
    return WeightSizes(model.num_parameters(), largest)


def inherit_cost(
    config: PreTrainedConfig, dsa: DsaConfig, sizes: WeightSizes, sequences: int, length: int, itemsize: int
) -> InheritCost:
    """Of `sequences` calibration texts of `length` tokens. itemsize: bytes of a weight."""
    layout, family = family_like(config).prefill_layout(config), family_like(config)
    key_width = layout.key_heads * layout.key_width
    numbers = STATES * config.hidden_size + QUERIES * layout.heads * layout.key_width + KEYS * key_width
    tokens = sequences * length
    work = tokens * (numbers * itemsize + 4 * key_width)
    work += 3 * TOKENS_PER_BLOCK * config.intermediate_size * itemsize
    work += 4 * PAIR_COPIES * PAIR_ROWS * layout.heads * length + 8 * RIDGE_COPIES * config.hidden_size**2
    once = PROGRAM_BYTES + work
    index = indexer_cost(config, dsa)
    indexer = index.key_weights + index.query_weights
    # Dense reads of the calibration; where layers share k, of its first two texts, and of two for four times.
    reads = tokens + (6 * min(2, sequences) * length if family.varies_topk else 0)
    attended = prefill_cost(config, dsa, max(1, length // 2), itemsize).dense_flops
    fit = sequences * len(dsa.layers) * FIT_QUERIES * length * layout.pair_flops
    return InheritCost(
        whole_bytes=once + (sizes.model + indexer * len(dsa.layers)) * itemsize,
        layers_bytes=once + (2 * sizes.layer + indexer) * itemsize,
        flops=reads * attended + fit,
    )
