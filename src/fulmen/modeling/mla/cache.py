"""A cache for MLA with index keys, written in place; a token's latent and rotary key lie side by side."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from fulmen.modeling.cache import CacheBytes, InPlaceIndexedLayer, TokenBuffer


class MlaLayer(InPlaceIndexedLayer):
    """One layer's latents (as `keys`), rotary keys (as `values`) and index keys.

    The first two are views of `joint_BSD`, which is what absorbed attention reads: no copy as the text grows.
    """

    latent_width = 0

    def buffers(self) -> tuple[TokenBuffer, ...]:
        """The joint buffer, and the index keys."""
        return self._keys, self._index_keys

    @property
    def joint_BSD(self) -> Tensor:
        """Latent and rotary key of all tokens, [B, S, L + R]."""
        assert self._keys.rows is not None, "update comes first"
        return self._keys.rows

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store latents [B, 1, T, L] and rotary keys [B, 1, T, R]; return views of all tokens."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.latent_width = key_states.shape[-1]
        self._keys.append(torch.cat((key_states[:, 0], value_states[:, 0]), dim=-1))
        self.keys, self.values = self._split_joint()
        return self.keys, self.values

    def _refresh_views(self) -> None:
        if self._keys.rows is not None:
            self.keys, self.values = self._split_joint()

    def _split_joint(self) -> tuple[Tensor, Tensor]:
        latent_B1SL, rope_B1SR = self.joint_BSD[:, None].tensor_split([self.latent_width], dim=-1)
        return latent_B1SL, rope_B1SR


class MlaCache(Cache):
    """The cache of a DeepSeek-V3.2 or GLM-5 model under fulmen's attention; the stock forward can use it too.

    Args:
        config: the model's config.
        max_length: tokens to allocate at once; without it the storage doubles as it fills.
    """

    layers: list[Any]

    def __init__(self, config: PreTrainedConfig, max_length: int | None = None) -> None:
        super().__init__(layers=[MlaLayer(max_length) for _ in range(config.num_hidden_layers)])

    @property
    def nbytes(self) -> CacheBytes:
        """Bytes of the stored tokens: latents with rotary keys, and index keys."""
        joint, index = zip(*(layer.buffers() for layer in self.layers), strict=True)
        return CacheBytes(sum(buffer.nbytes for buffer in joint), sum(buffer.nbytes for buffer in index))
