"""What a token costs, by its position: bytes of cache and floating-point operations, dense and with DSA.

Everything follows from the config. With S visible keys (the token itself included), H heads of width D, G
key/value heads, J index heads of width E, I index key heads, K keys kept, b bytes per number, one layer costs

    keys and values      c = 2 G D numbers a token (GQA), or L + R (MLA: latent and rotary key)
    one query-key pair   a = 4 H D FLOPs (GQA), or 2 H (2 L + R) (MLA, absorbed): logit and value
    one index key        y = I (E + 2) bytes (GQA: 8 bits a number and a scale), or E b (MLA)
    one index pair       x = 2 J (E + 1) FLOPs: dot products, and the weighted sum over heads

                                dense      DSA, S <= K           DSA, S > K
    decode, bytes               S c b      S c b + y             K c b + S y
    decode, FLOPs               S a        S a + keys            K a + S x + keys + queries
    prefill, bytes a token      S c b / Q  S c b / Q + y         K c b + S y / Q
    prefill, FLOPs a token      S a        as decode             as decode

where "keys" and "queries" are the indexer's projections (2 FLOPs a weight) and Q = PREFILL_BLOCK queries
share one read of the keys; selected keys are gathered for each query by itself. Up to K tokens nothing is
scored: DSA reads what dense attention reads and only stores an index key. A sliding layer sees its window;
layers that are not converted cost the same on both sides. The other weights add 2 FLOPs each (of a mixture of
experts: those of the experts that a token visits; the output head in decoding only, where every token needs
it). Norms, softmax, biases and the read of the weights, which a batch shares, are left out.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

from transformers import PreTrainedConfig

from fulmen.config import DsaConfig, require_positive_int
from fulmen.modeling.cache import CacheBytes
from fulmen.modeling.indexer import model_head_width
from fulmen.ops.index_keys import SCALE_BYTES

PREFILL_BLOCK = 128


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


class AttentionShape(NamedTuple):
    """One layer's attention: numbers kept per token, FLOPs per query-key pair, weights of its projections."""

    token_width: int
    pair_flops: int
    weights: int


class IndexerShape(NamedTuple):
    """One layer's indexer: FLOPs per pair, weights for index keys and for queries."""

    pair_flops: int
    key_weights: int
    query_weights: int


class _Side(NamedTuple):
    """Bytes and FLOPs of one layer, or of all."""

    bytes: float
    flops: float


def decode_cost(config: PreTrainedConfig, dsa: DsaConfig, position: int, dtype_bytes: int = 2) -> StepCost:
    """Cost of generating the token that sees `position` tokens, itself included.

    Args:
        config: of a dense or converted model of any supported family.
        dsa: index shape, k and converted layers.
        position: S, at least 1.
        dtype_bytes: bytes per number in the cache (2: bfloat16).

    Raises ConfigError if `position` is no positive integer.
    """
    head = 2 * config.hidden_size * config.vocab_size
    return _step_cost(config, dsa, position, dtype_bytes, 1, head)


def prefill_cost(config: PreTrainedConfig, dsa: DsaConfig, position: int, dtype_bytes: int = 2) -> StepCost:
    """Cost of reading the prompt's token number `position`, as one of a block; otherwise as `decode_cost`."""
    return _step_cost(config, dsa, position, dtype_bytes, PREFILL_BLOCK, 0)


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
    """What fulmen's caches keep per token: keys and values of all layers, and the index keys."""
    kv = attention_shape(config).token_width * config.num_hidden_layers
    index_keys = index_key_bytes(config, dsa, dtype_bytes) * len(_indexer_layers(config, dsa))
    return CacheBytes(kv * dtype_bytes, index_keys)


def index_key_bytes(config: PreTrainedConfig, dsa: DsaConfig, dtype_bytes: int = 2) -> int:
    """What a cache keeps of one token's index keys in one converted layer."""
    if is_mla(config):
        return dsa.index_head_dim * dtype_bytes
    return dsa.index_n_kv_heads * (dsa.index_head_dim + SCALE_BYTES)


def index_key_share(config: PreTrainedConfig, dsa: DsaConfig, dtype_bytes: int = 2) -> float:
    """Index keys over keys and values, per token of one converted layer: what DSA adds to the cache."""
    kv_bytes = attention_shape(config).token_width * dtype_bytes
    return index_key_bytes(config, dsa, dtype_bytes) / kv_bytes


def is_mla(config: PreTrainedConfig) -> bool:
    """Whether the model has multi-head latent attention (DeepSeek, GLM-5), not grouped heads."""
    return getattr(config, "kv_lora_rank", None) is not None


def attention_shape(config: PreTrainedConfig) -> AttentionShape:
    """The shape of one layer's attention, from either kind of config."""
    heads, hidden = config.num_attention_heads, config.hidden_size
    if not is_mla(config):
        width, groups = model_head_width(config), config.num_key_value_heads
        return AttentionShape(2 * groups * width, 4 * heads * width, 2 * hidden * (heads + groups) * width)
    latent, rope, q_rank = config.kv_lora_rank, config.qk_rope_head_dim, config.q_lora_rank
    q_width = heads * (config.qk_nope_head_dim + rope)
    q_weights = q_rank * (hidden + q_width) if q_rank else hidden * q_width
    up_weights = latent * heads * (config.qk_nope_head_dim + config.v_head_dim)
    weights = q_weights + hidden * (latent + rope) + up_weights + heads * config.v_head_dim * hidden
    return AttentionShape(latent + rope, 2 * heads * (2 * latent + rope), weights)


def indexer_shape(config: PreTrainedConfig, dsa: DsaConfig) -> IndexerShape:
    """The shape of one layer's indexer; what its projections read depends on the kind of model."""
    index_heads, width, hidden = dsa.index_n_heads, dsa.index_head_dim, config.hidden_size
    keys = dsa.index_n_kv_heads * width
    pair_flops = 2 * index_heads * (width + 1)
    if is_mla(config):
        query_weights = (config.q_lora_rank or hidden) * index_heads * width + hidden * index_heads
        return IndexerShape(pair_flops, hidden * keys, query_weights)
    head = model_head_width(config)
    query_weights = config.num_attention_heads * head * index_heads * width + 2 * hidden * index_heads
    return IndexerShape(pair_flops, config.num_key_value_heads * head * keys, query_weights)


def layer_weights(config: PreTrainedConfig) -> int:
    """Weights of all layers that one token is multiplied with: attention's projections and the MLPs."""
    attention = attention_shape(config).weights * config.num_hidden_layers
    n_moe = _moe_layers(config)
    dense = 3 * config.hidden_size * config.intermediate_size * (config.num_hidden_layers - n_moe)
    if not n_moe:
        return attention + dense
    experts = config.num_experts_per_tok + (config.n_shared_experts or 0)
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    router = config.hidden_size * config.n_routed_experts
    return attention + dense + n_moe * (experts * expert + router)


def layer_windows(config: PreTrainedConfig) -> list[int | None]:
    """For each layer the number of tokens that its queries see; None: all."""
    kinds, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
    if not kinds:
        return [window] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]


def _step_cost(
    config: PreTrainedConfig, dsa: DsaConfig, position: int, dtype_bytes: int, block: int, head_flops: int
) -> StepCost:
    """One token at `position`; `block` queries share a read of what all of them see."""
    require_positive_int("position", position)
    attention, indexed = attention_shape(config), _indexer_layers(config, dsa)
    converted = set(dsa.layers)
    linear = 2 * layer_weights(config) + head_flops

    def dense_layer(layer: int) -> _Side:
        visible = min(position, windows[layer] or position)
        read = visible * attention.token_width * dtype_bytes / block
        return _Side(read, visible * attention.pair_flops)

    def dsa_layer(layer: int) -> _Side:
        if layer not in converted:
            return dense_layer(layer)
        attended, index = dense_layer(layer), _Side(0, 0)
        kept = dsa.layer_topk(layer)
        selects = position > max(dsa.topk, kept)
        if selects:
            attended = _Side(kept * attention.token_width * dtype_bytes, kept * attention.pair_flops)
        if layer in indexed:
            index = _index_cost(indexer_shape(config, dsa), stored, position, selects, block)
        return _Side(attended.bytes + index.bytes, attended.flops + index.flops)

    windows, stored = layer_windows(config), index_key_bytes(config, dsa, dtype_bytes)
    dense, sparse = _all_layers(dense_layer, config), _all_layers(dsa_layer, config)
    return StepCost(dense.bytes, sparse.bytes, dense.flops + linear, sparse.flops + linear)


def _index_cost(shape: IndexerShape, stored: int, position: int, scores: bool, block: int) -> _Side:
    if not scores:
        return _Side(stored, 2 * shape.key_weights)
    projections = 2 * (shape.key_weights + shape.query_weights)
    return _Side(position * stored / block, position * shape.pair_flops + projections)


def _moe_layers(config: PreTrainedConfig) -> int:
    if kinds := getattr(config, "mlp_layer_types", None):
        return kinds.count("sparse")
    first = getattr(config, "first_k_dense_replace", None)
    return 0 if first is None else max(0, config.num_hidden_layers - first)


def _all_layers(cost: Callable[[int], _Side], config: PreTrainedConfig) -> _Side:
    sides = [cost(layer) for layer in range(config.num_hidden_layers)]
    return _Side(sum(side.bytes for side in sides), sum(side.flops for side in sides))


def _indexer_layers(config: PreTrainedConfig, dsa: DsaConfig) -> set[int]:
    """Converted layers with an indexer of their own; GLM-5's "shared" ones take another layer's selection."""
    kinds = getattr(config, "indexer_types", None)
    return {layer for layer in dsa.layers if not kinds or kinds[layer] != "shared"}
