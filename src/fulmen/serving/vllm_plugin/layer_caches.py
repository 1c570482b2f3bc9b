"""What a converted layer keeps of its tokens: in two or three caches, or, in a hybrid, in the rows of one.

A hybrid has layers with linear attention beside, and vLLM takes the blocks for their states from the same
memory as those of keys: all must have one size. It pads states to the size of an attention's block, but index
keys in blocks of their own would have to fill as much. So there a token's row has its keys and values, and
then its index keys of each level.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec

from fulmen.serving.vllm_plugin.caches import IndexKeyCache, KeyValueCache, PagedCache

# Of bytes, so that each row of a joint cache begins where a line of the processor's cache does.
ROW_MULTIPLE = 64


class LayerCaches(NamedTuple):
    """The caches of a layer.

    Attributes:
        kv: keys and values.
        index_keys, coarse_keys: of the index; the latter where it has two levels.
    """

    kv: "KeyValueCache | JointCache"
    index_keys: "IndexKeyCache | IndexKeysInRows"
    coarse_keys: "IndexKeyCache | IndexKeysInRows | None"


def caches_of_layer(
    name: str, vllm_config: VllmConfig, heads: int, head_dim: int, widths: Sequence[int]
) -> LayerCaches:
    """Caches of an attention called `name`, whose index keys have `widths` bytes in each of its levels."""
    own = f"{name}.attn"
    kv: KeyValueCache | JointCache
    keys: list[IndexKeyCache | IndexKeysInRows]
    if vllm_config.model_config.is_hybrid:
        kv = joint = JointCache(own, vllm_config, heads, head_dim, sum(widths))
        starts = accumulate(widths, initial=joint.kv_bytes)
        keys = [IndexKeysInRows(joint, start, width) for start, width in zip(starts, widths, strict=False)]
    else:
        kv = KeyValueCache(own, vllm_config, heads, head_dim)
        names = (f"{name}.index_keys", f"{name}.coarse_keys")
        keys = [IndexKeyCache(own, vllm_config, width) for own, width in zip(names, widths, strict=False)]
    return LayerCaches(kv, keys[0], keys[1] if len(keys) > 1 else None)


class JointCache(PagedCache):
    """Keys and values as in `KeyValueCache`, then packed index keys, and padding: one row for each token."""

    def __init__(
        self, name: str, vllm_config: VllmConfig, heads: int, head_dim: int, index_bytes: int
    ) -> None:
        super().__init__(name, vllm_config)
        dtype: Any = vllm_config.model_config.dtype  # resolved by now
        self.heads, self.dtype = heads, dtype
        self.kv_bytes = heads * 2 * head_dim * dtype.itemsize
        self.row_bytes = -(-(self.kv_bytes + index_bytes) // ROW_MULTIPLE) * ROW_MULTIPLE

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        # To vLLM one head, a byte for each number; its "keys" and "values" are halves of the row.
        return FullAttentionSpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=1,
            head_size=self.row_bytes // 2,
            dtype=torch.int8,
        )

    def bytes_RX(self, start: int, width: int) -> Tensor:
        """int8, these bytes of each row."""
        return super().rows_RHC()[:, 0, start : start + width]

    def rows_RHC(self) -> Tensor:
        """Keys and values alone."""
        return self.bytes_RX(0, self.kv_bytes).view(self.dtype).unflatten(1, (self.heads, -1))


class IndexKeysInRows:
    """As `IndexKeyCache`, of the packed index keys of one level in a joint cache."""

    def __init__(self, joint: JointCache, start: int, width: int) -> None:
        self.joint, self.start, self.width = joint, start, width
        self.name = joint.name

    @property
    def rows_per_block(self) -> int:
        """As of the whole cache."""
        return self.joint.rows_per_block

    def rows_RHC(self) -> Tensor:
        """int8 `[R, 1, width]`."""
        return self.joint.bytes_RX(self.start, self.width)[:, None]
