"""What a token costs, by its position: bytes of cache and floating-point operations, dense and with DSA.

Everything follows from the config. With S visible keys (the token itself included), H heads of width D, G
key/value heads, J index heads of width E, I index key heads, K keys kept, b bytes per number, one layer costs

    keys and values      c = 2 G D numbers a token (GQA), or L + R (MLA: latent and rotary key)
    one query-key pair   a = 4 H D FLOPs (GQA), or 2 H (2 L + R) (MLA, absorbed): logit and value
    the same, expanded   e = a (GQA), or 2 H (N + R + V) (MLA: each head's own keys and values)
    one index key        y = I (E + 2) bytes (GQA: 8 bits a number and a scale), or E b (MLA)
    one index pair       x = 2 J (E + 1) FLOPs: dot products, and the weighted sum over heads
    one coarse key       z = N + 2 bytes (an index in two levels; else there is none)
    one coarse pair      2 M (N + 1) operations

                                dense      DSA, S <= K           DSA, S > K
    decode, bytes               S c b      S c b + y             K c b + S y
    decode, FLOPs               S a        S a + keys            K a + S x + keys + queries
    prefill, bytes a token      S c b / Q  S c b / Q + y         K c b + S y / Q
    prefill, FLOPs a token      S e        S e + keys            as decode

In two levels S y becomes S z + C y and S x becomes S 2 N + C x where S > 4 C, with C = c K candidates; "+ y"
for a token that is stored is "+ y + z". What a prompt's queries share of their candidates is left out.

where "keys" and "queries" are the indexer's projections (2 FLOPs a weight) and Q = PREFILL_BLOCK queries
share one read of the keys; selected keys are gathered for each query by itself. Reading a prompt, dense MLA
expands each latent once, by weights that count among the others, and pays less per pair than absorbed; a
selection, another one for each query, is read absorbed. Up to K tokens nothing is scored: DSA reads what
dense attention reads and only stores an index key. A sliding layer sees its window; layers that are not
converted cost the same with and without DSA; one with linear attention reads and writes its state, of one
size at every position (a prompt's, once for Q tokens). The other weights add 2 FLOPs each (of a mixture of
experts: those of the experts that a token visits; the output head in decoding only, where every token needs
it). Norms, softmax, biases and the read of the weights, which a batch shares (`read_weights`), are left out.
"""

from collections.abc import Iterable
from typing import NamedTuple

from transformers import PreTrainedConfig

from fulmen.config import COARSE_FROM, DsaConfig, candidates_left, require_positive_int
from fulmen.modeling.cache import CacheBytes
from fulmen.modeling.experts import experts_of
from fulmen.modeling.families import family_like
from fulmen.modeling.family import IndexerCost
from fulmen.modeling.linear_layers import linear_cost, linear_layers
from fulmen.modeling.windows import layer_windows

PREFILL_BLOCK = 128
# States of linear attention are float32.
STATE_BYTES = 4


class StepCost(NamedTuple):
    """One token, all layers: bytes of cache read or written, and floating-point operations."""

    dense_bytes: float
    dsa_bytes: float
    dense_flops: float
    dsa_flops: float


class CostRow(NamedTuple):
    """What a token costs when decoded or read at `position`, and what the cache holds by then (bytes)."""

    position: int
    decode: StepCost
    prefill: StepCost
    cache: CacheBytes


class Work(NamedTuple):
    """Bytes of cache read or written, and floating-point operations."""

    bytes: float
    flops: float


class StepParts(NamedTuple):
    """One token's work, all layers, by what does it.

    Attributes:
        weights: that the token is multiplied with, 2 FLOPs each; the indexers' apart.
        index_weights: the indexers', likewise.
        dense_attention, dsa_attention: queries, keys and values.
        index_scores: index keys: stored, and read and scored where something is selected.
        linear_attention: states, with and without DSA.
    """

    weights: int
    index_weights: int
    dense_attention: Work
    dsa_attention: Work
    index_scores: Work
    linear_attention: Work

    def cost(self) -> StepCost:
        """The sums, with and without DSA."""
        dense, dsa, index = self.dense_attention, self.dsa_attention, self.index_scores
        rest = Work(self.linear_attention.bytes, self.linear_attention.flops + 2 * self.weights)
        return StepCost(
            dense_bytes=dense.bytes + rest.bytes,
            dsa_bytes=dsa.bytes + index.bytes + rest.bytes,
            dense_flops=dense.flops + rest.flops,
            dsa_flops=dsa.flops + index.flops + rest.flops + 2 * self.index_weights,
        )


class LayerStep(NamedTuple):
    """What one layer does for a token.

    Attributes:
        visible: tokens that dense attention reads; 0 where attention is linear.
        topk: tokens that DSA reads in their place; None where it attends to all visible ones.
        has_indexer: whether it stores an index key; where there is a `topk` it scores all positions too.
    """

    visible: int
    topk: int | None
    has_indexer: bool


class AttentionCost(NamedTuple):
    """One layer's attention: numbers kept per token, FLOPs per query-key pair, weights of its projections.

    `expanded_pair_flops`: with each head's own keys and values, as dense attention reads a prompt.
    """

    token_width: int
    pair_flops: int
    expanded_pair_flops: int
    weights: int


def decode_cost(config: PreTrainedConfig, dsa: DsaConfig, position: int, dtype_bytes: int = 2) -> StepCost:
    """Cost of generating the token that sees `position` tokens, itself included.

    Args:
        config: of a dense or converted model of any supported family.
        dsa: index shape, k and converted layers.
        position: S, at least 1.
        dtype_bytes: bytes per number in the cache (2: bfloat16).

    Raises ConfigError if `position` is no positive integer.
    """
    return decode_parts(config, dsa, position, dtype_bytes).cost()


def prefill_cost(config: PreTrainedConfig, dsa: DsaConfig, position: int, dtype_bytes: int = 2) -> StepCost:
    """Cost of reading the prompt's token number `position`, as one of a block; otherwise as `decode_cost`."""
    return prefill_parts(config, dsa, position, dtype_bytes).cost()


def decode_parts(config: PreTrainedConfig, dsa: DsaConfig, position: int, dtype_bytes: int = 2) -> StepParts:
    """`decode_cost` in parts; arguments and errors are the same."""
    weights = layer_weights(config) + head_weights(config)
    pair_flops = attention_cost(config).pair_flops
    return _step_parts(config, dsa, position, dtype_bytes, 1, weights, pair_flops)


def prefill_parts(config: PreTrainedConfig, dsa: DsaConfig, position: int, dtype_bytes: int = 2) -> StepParts:
    """`prefill_cost` in parts; arguments and errors are the same."""
    pair_flops = attention_cost(config).expanded_pair_flops
    return _step_parts(config, dsa, position, dtype_bytes, PREFILL_BLOCK, layer_weights(config), pair_flops)


def cost_rows(
    config: PreTrainedConfig, dsa: DsaConfig, positions: Iterable[int], dtype_bytes: int = 2
) -> list[CostRow]:
    """Both costs and the cache's size at each position. Raises ConfigError for a position below 1."""
    token = token_bytes(config, dsa, dtype_bytes)
    return [
        CostRow(
            position,
            decode_cost(config, dsa, position, dtype_bytes),
            prefill_cost(config, dsa, position, dtype_bytes),
            CacheBytes(token.kv * position, token.index_keys * position),
        )
        for position in positions
    ]


def token_bytes(config: PreTrainedConfig, dsa: DsaConfig, dtype_bytes: int = 2) -> CacheBytes:
    """What fulmen's caches keep per token: keys and values of layers that have some, and index keys."""
    kv = attention_cost(config).token_width * _layers_with_keys(config)
    layer = index_key_bytes(config, dsa, dtype_bytes) + family_like(config).coarse_key_bytes(dsa)
    index_keys = layer * len(_indexer_layers(config, dsa))
    return CacheBytes(kv * dtype_bytes, index_keys)


def index_key_bytes(config: PreTrainedConfig, dsa: DsaConfig, dtype_bytes: int = 2) -> int:
    """What a cache keeps of one token's index keys in one converted layer."""
    return family_like(config).index_key_bytes(dsa, dtype_bytes)


def index_key_share(config: PreTrainedConfig, dsa: DsaConfig, dtype_bytes: int = 2) -> float:
    """Index keys over keys and values, per token of one converted layer: what DSA adds to the cache."""
    kv_bytes = attention_cost(config).token_width * dtype_bytes
    keys = index_key_bytes(config, dsa, dtype_bytes) + family_like(config).coarse_key_bytes(dsa)
    return keys / kv_bytes


def attention_cost(config: PreTrainedConfig) -> AttentionCost:
    """What one layer's attention costs; of a model that no family knows too, for a server holds its keys."""
    family = family_like(config)
    layout, prefill = family.attention_layout(config), family.prefill_layout(config)
    return AttentionCost(
        layout.token_width, layout.pair_flops, prefill.pair_flops, family.attention_weights(config)
    )


def indexer_cost(config: PreTrainedConfig, dsa: DsaConfig) -> IndexerCost:
    """What one layer's indexer costs; what its projections read depends on the family."""
    return family_like(config).indexer_cost(config, dsa)


def layer_weights(config: PreTrainedConfig) -> int:
    """Weights of all layers that one token is multiplied with: attention's projections and the MLPs."""
    attention = attention_cost(config).weights * _layers_with_keys(config)
    attention += linear_cost(config).weights * len(linear_layers(config))
    # Where all layers have experts a config may have no such width.
    width = getattr(config, "intermediate_size", None) or 0
    plain = family_like(config).mlp_matrices * config.hidden_size * width
    experts = experts_of(config)
    if experts is None:
        return attention + plain * config.num_hidden_layers
    mixture = experts.always + experts.chosen * experts.weights
    return attention + plain * (config.num_hidden_layers - experts.layers) + mixture * experts.layers


def _layers_with_keys(config: PreTrainedConfig) -> int:
    return int(config.num_hidden_layers) - len(linear_layers(config))


def head_weights(config: PreTrainedConfig) -> int:
    """Weights of the output head, which every generated token is multiplied with."""
    return config.hidden_size * config.vocab_size


def read_weights(config: PreTrainedConfig, batch: int) -> float:
    """Weights that one decoding step of `batch` tokens reads, the output head included, the indexers' not.

    All tokens share one read. Of a mixture of n experts with m a token, tokens that choose evenly and each by
    itself visit n (1 - (1 - m/n)^batch) on average.
    """
    weights = layer_weights(config) + head_weights(config)
    if not (experts := experts_of(config)):
        return weights
    visited = experts.total * (1 - (1 - experts.chosen / experts.total) ** batch)
    return weights + experts.layers * (visited - experts.chosen) * experts.weights


def layer_steps(config: PreTrainedConfig, dsa: DsaConfig, position: int) -> list[LayerStep]:
    """What each layer does for the token that sees `position` tokens, itself included."""
    require_positive_int("position", position)
    converted, indexed = set(dsa.layers), _indexer_layers(config, dsa)
    linear = set(linear_layers(config))

    def step(layer: int, window: int | None) -> LayerStep:
        visible = 0 if layer in linear else min(position, window or position)
        if layer not in converted:
            return LayerStep(visible, None, False)
        kept = dsa.layer_topk(layer)
        return LayerStep(visible, kept if position > max(dsa.topk, kept) else None, layer in indexed)

    return [step(layer, window) for layer, window in enumerate(layer_windows(config))]


def _step_parts(
    config: PreTrainedConfig,
    dsa: DsaConfig,
    position: int,
    dtype_bytes: int,
    block: int,
    weights: int,
    pair_flops: int,
) -> StepParts:
    """One token; `block` queries share a read of what all of them see, at `pair_flops` a pair."""
    layers = layer_steps(config, dsa, position)
    attention, indexer = attention_cost(config), indexer_cost(config, dsa)
    token, index_key = attention.token_width * dtype_bytes, index_key_bytes(config, dsa, dtype_bytes)

    def attended(count: int) -> Work:
        return Work(count * token / block, count * pair_flops)

    rest = attended(sum(layer.visible for layer in layers if layer.topk is None))
    kept = sum(layer.topk or 0 for layer in layers)
    scoring = sum(layer.has_indexer and layer.topk is not None for layer in layers)
    storing = sum(layer.has_indexer for layer in layers) - scoring
    coarse_key = family_like(config).coarse_key_bytes(dsa)
    level = _IndexLevel(index_key, indexer.pair_flops, coarse_key, indexer.coarse_pair_flops)
    scored = [level.scoring(dsa, layer, position) for layer in layers if layer.has_indexer and layer.topk]
    state = linear_cost(config)
    n_linear = len(linear_layers(config))
    index_bytes = (index_key + coarse_key) * storing + sum(work.bytes for work in scored) / block
    return StepParts(
        weights=weights,
        index_weights=(scoring + storing) * indexer.key_weights + scoring * indexer.query_weights,
        dense_attention=attended(sum(layer.visible for layer in layers)),
        dsa_attention=Work(rest.bytes + kept * token, rest.flops + kept * attention.pair_flops),
        index_scores=Work(index_bytes, sum(work.flops for work in scored)),
        linear_attention=Work(n_linear * 2 * state.state * STATE_BYTES / block, n_linear * state.flops),
    )


class _IndexLevel(NamedTuple):
    """Bytes of a key and FLOPs of a pair, of the indexer and of the coarse level (0: there is none)."""

    key_bytes: int
    pair_flops: int
    coarse_bytes: int
    coarse_flops: int

    def scoring(self, dsa: DsaConfig, layer: LayerStep, position: int) -> Work:
        """Of one query and all keys that it sees."""
        candidates = candidates_left(dsa.candidate_factor, layer.topk or 0, dsa.topk)
        if not self.coarse_bytes or position <= COARSE_FROM * candidates:
            return Work(position * self.key_bytes, position * self.pair_flops)
        return Work(
            position * self.coarse_bytes + candidates * self.key_bytes,
            position * self.coarse_flops + candidates * self.pair_flops,
        )


def _indexer_layers(config: PreTrainedConfig, dsa: DsaConfig) -> set[int]:
    """Converted layers with an indexer of their own; GLM-5's "shared" ones take another layer's selection."""
    kinds = getattr(config, "indexer_types", None)
    return {layer for layer in dsa.layers if not kinds or kinds[layer] != "shared"}
