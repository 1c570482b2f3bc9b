"""The two caches of a converted layer, in vLLM's block tables: keys with values, and packed index keys.

Each is a cache layer of its own to vLLM, of the kind "full attention". So they share one group, one block
table and one slot per token, and whatever happens to a block of keys happens to its index keys: a prefix hit
brings both back, preemption drops both.
"""

from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheLayout,
    KVCacheSpec,
    MLAAttentionSpec,
    SparseCacheRole,
)

from fulmen.serving.vllm_plugin.step import StepBuilder


class DsaBackend(AttentionBackend):
    """What vLLM asks about a cache; attention itself is `DsaAttention` or `MlaDsaAttention`."""

    supported_dtypes = [torch.float32, torch.bfloat16]  # noqa: RUF012

    @staticmethod
    def get_name() -> str:
        return "FULMEN_DSA"

    @staticmethod
    def get_impl_cls() -> Any:
        raise NotImplementedError

    @staticmethod
    def get_builder_cls() -> type[StepBuilder]:
        return StepBuilder

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        # The first has a token's heads side by side; the second is that of vLLM's own CPU attention.
        return (KVCacheLayout.LBNHC, KVCacheLayout.LBHNC)


class PagedCache(nn.Module, AttentionLayerBase):
    """A cache layer that vLLM allocates, `[blocks, heads, block_size, bytes or numbers of a head]`.

    Takes its `name`, which must hold the layer's index and no other integer, from a layer that has it
    already.
    """

    kv_cache: Tensor

    def __init__(self, name: str, vllm_config: VllmConfig) -> None:
        super().__init__()
        self.name = name
        self.kv_cache = torch.tensor([])
        vllm_config.compilation_config.static_forward_context[name] = self

    def get_attn_backend(self) -> type[AttentionBackend]:
        return DsaBackend

    @property
    def rows_per_block(self) -> int:
        """How many rows lie between the first tokens of two blocks; a row is what a step in N passes over."""
        block_stride, _, row_stride, _ = self.kv_cache.stride()
        assert block_stride % row_stride == 0, "blocks of whole rows"
        return block_stride // row_stride

    def rows_RHC(self) -> Tensor:
        """The whole cache as rows, one for each token (and, head-major, rows between that are never used)."""
        blocks, heads, block_size, width = self.kv_cache.shape
        rows = (blocks - 1) * self.rows_per_block + block_size
        _, head_stride, row_stride, _ = self.kv_cache.stride()
        return self.kv_cache.as_strided((rows, heads, width), (row_stride, head_stride, 1))


class KeyValueCache(PagedCache):
    """Keys and values: a head's key, then its value, in the model's dtype."""

    def __init__(self, name: str, vllm_config: VllmConfig, heads: int, head_dim: int) -> None:
        super().__init__(name, vllm_config)
        self.heads, self.head_dim = heads, head_dim

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        dtype: Any = vllm_config.model_config.dtype  # resolved by now
        return FullAttentionSpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=self.heads,
            head_size=self.head_dim,
            dtype=dtype,
        )


class IndexKeyCache(PagedCache):
    """Packed index keys (`fulmen.ops.common.index_keys`): so many bytes a token, the same on every rank."""

    def __init__(self, name: str, vllm_config: VllmConfig, width: int) -> None:
        super().__init__(name, vllm_config)
        self.width = width

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        return MLAAttentionSpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=1,
            head_size=self.width,
            dtype=torch.int8,
            max_tp_shards=1,
            cache_role=SparseCacheRole.INDEXER,
        )


class LatentCache(PagedCache):
    """Latents and rotary keys of an MLA layer, side by side, in the model's dtype; the same on every rank."""

    role = SparseCacheRole.SPARSE

    def __init__(self, name: str, vllm_config: VllmConfig, width: int) -> None:
        super().__init__(name, vllm_config)
        self.width = width

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        dtype: Any = vllm_config.model_config.dtype  # resolved by now
        return MLAAttentionSpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=1,
            head_size=self.width,
            dtype=dtype,
            max_tp_shards=1,
            cache_role=self.role,
        )


class MlaIndexKeyCache(LatentCache):
    """Index keys of an MLA layer, which are kept as they are computed."""

    role = SparseCacheRole.INDEXER
