"""The cache of a GQA DSA model."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, LinearAttentionLayer

from fulmen.errors import CacheError
from fulmen.modeling.cache import CacheBytes, InPlaceIndexedLayer, InPlaceLayer
from fulmen.modeling.linear_layers import linear_layers
from fulmen.ops.common.index_keys import SCALE_BYTES


class DsaCache(Cache):
    """The cache of a DSA model. Layers with linear attention have Transformers' own in it, with one state.

    Args:
        config: the model's config; its converted layers get room for index keys.
        max_length: tokens to allocate at once; without it the storage doubles as it fills.
    """

    layers: list[Any]

    def __init__(self, config: PreTrainedConfig, max_length: int | None = None) -> None:
        converted, linear = set(converted_layers(config)), set(linear_layers(config))

        def make(layer: int) -> Any:
            if layer in linear:
                return LinearAttentionLayer()
            return InPlaceIndexedLayer(max_length) if layer in converted else InPlaceLayer(max_length)

        super().__init__(layers=[make(layer) for layer in range(config.num_hidden_layers)])

    def update_coarse(self, packed_BTX: Tensor, layer_idx: int) -> Tensor:
        """Store the packed coarse keys of T tokens; return those of all tokens so far, `[B, S, N + 2]`."""
        stored: Tensor = self.layers[layer_idx].update_coarse(packed_BTX)
        return stored

    @property
    def nbytes(self) -> CacheBytes:
        """Bytes of the stored tokens: keys and values of all layers, index keys of the converted ones.

        The states of layers with linear attention, which do not grow, are left out.
        """
        buffers = [layer.buffers() for layer in self.layers if isinstance(layer, InPlaceLayer)]
        kv = sum(buffer.nbytes for stored in buffers for buffer in stored[:2])
        return CacheBytes(kv, sum(buffer.nbytes for stored in buffers for buffer in stored[2:]))


def converted_layers(config: PreTrainedConfig) -> list[int]:
    """The layers with an indexer, as the model has checked them: read often, and by torch's compiler."""
    return list(config.dsa["layers"])


def require_index_key_layers(cache: Cache, config: PreTrainedConfig) -> None:
    """Raise CacheError unless every converted layer of `cache` can hold index keys, and those that it holds
    are of as many levels as the model's.
    """
    layers, coarse = getattr(cache, "layers", []), config.dsa.get("coarse_head_dim")
    for layer in converted_layers(config):
        needed = "update_coarse" if coarse else "update_indexer"
        if layer >= len(layers) or not all(hasattr(part, needed) for part in (cache, layers[layer])):
            raise CacheError(
                f"{type(cache).__name__} has no room for the index keys of layer {layer}; "
                "pass fulmen.modeling.gqa.cache.DsaCache(model.config), or no cache"
            )
    if isinstance(cache, DsaCache) and not torch.compiler.is_compiling():
        _require_levels(cache, config, coarse + SCALE_BYTES if coarse else 0)


def _require_levels(cache: DsaCache, config: PreTrainedConfig, width: int) -> None:
    """Raise CacheError for a cache that a model of another index has filled; width: bytes of a coarse key."""
    for layer in converted_layers(config):
        stored = cache.layers[layer]
        if not stored.has_coarse_keys(width):
            wanted = f"need coarse keys of {width} bytes" if width else "are to have no coarse keys"
            raise CacheError(
                f"{type(cache).__name__} was filled by a model of another index: its "
                f"{stored.get_seq_length()} tokens of layer {layer} {wanted}; "
                "read them anew with fulmen.modeling.gqa.cache.DsaCache(model.config)"
            )
