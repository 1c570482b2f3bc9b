"""Layers of a cache that are written in place: keys, values and index keys."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionLayer


class CacheBytes(NamedTuple):
    """Bytes that the stored tokens take, without spare storage."""

    kv: int
    index_keys: int


class TokenBuffer:
    """One row per token, `[B, tokens, ...]`: appended in place, into storage that doubles when it is full.

    Tokens lie one after the other, all heads of a token together: a selected token is one contiguous read.
    """

    def __init__(self, planned: int | None) -> None:
        self.planned = planned or 0
        self.length = 0
        self._storage: Tensor | None = None

    @property
    def rows(self) -> Tensor | None:
        """View of the stored tokens; None before the first."""
        return None if self._storage is None else self._storage[:, : self.length]

    @property
    def width(self) -> int | None:
        """Numbers on the last axis of a token; None before the first."""
        return None if self._storage is None else self._storage.shape[-1]

    def append(self, new: Tensor) -> Tensor:
        """Store `new` `[B, T, ...]`; return the view of all tokens."""
        start, self.length = self.length, self.length + new.shape[1]
        if torch.is_grad_enabled() and new.requires_grad:
            # Autograd must not see the keys it saved overwritten.
            self._storage = (
                new if self._storage is None else torch.cat((self._storage[:, :start], new), dim=1)
            )
            return self._storage
        storage = self._storage_for(new, start)
        storage[:, start : self.length] = new
        return storage[:, : self.length]

    def change_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply `change` to the batch axis of the stored tokens, keeping the storage."""
        if self._storage is not None:
            changed = change(self._storage[:, : self.length])
            self._storage = changed.new_empty(changed.shape[0], *self._storage.shape[1:])
            self._storage[:, : self.length] = changed

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tokens."""
        return 0 if self.rows is None else self.rows.numel() * self.rows.element_size()

    def _storage_for(self, new: Tensor, start: int) -> Tensor:
        old = self._storage
        if old is not None and self.length <= old.shape[1]:
            return old
        tokens = max(self.length, self.planned, 0 if old is None else 2 * old.shape[1])
        self._storage = new.new_empty(new.shape[0], tokens, *new.shape[2:])
        if old is not None:
            self._storage[:, :start] = old[:, :start]
        return self._storage


class InPlaceLayer(CacheLayerMixin):
    """Keys and values of one layer, `[B, G, S, D]` to the outside; a sliding layer keeps all tokens too."""

    is_sliding = False
    is_croppable = True

    def __init__(self, planned: int | None = None) -> None:
        super().__init__()
        self._keys, self._values = TokenBuffer(planned), TokenBuffer(planned)

    def buffers(self) -> tuple[TokenBuffer, ...]:
        """Everything stored, keys and values first."""
        return self._keys, self._values

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store `[B, G, T, D]`; return views `[B, G, S, D]` of all tokens."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._keys.append(key_states.transpose(1, 2)).transpose(1, 2)
        self.values = self._values.append(value_states.transpose(1, 2)).transpose(1, 2)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self._keys.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self._truncate(0)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens; a positive number is the length to keep (old usage)."""
        length = self.get_seq_length()
        kept = length + tokens_to_remove if tokens_to_remove <= 0 else min(tokens_to_remove, length)
        self._truncate(max(kept, 0))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._change_batch(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change_batch(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._change_batch(lambda rows: rows[indices])

    def _truncate(self, length: int) -> None:
        for buffer in self.buffers():
            # One that a model does not fill stays empty.
            buffer.length = min(length, buffer.length)
        self._refresh_views()

    def _change_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        for buffer in self.buffers():
            buffer.change_batch(change)
        self._refresh_views()

    def _refresh_views(self) -> None:
        keys, values = self._keys.rows, self._values.rows
        if keys is not None and values is not None:
            self.keys, self.values = keys.transpose(1, 2), values.transpose(1, 2)


class InPlaceIndexedLayer(InPlaceLayer):
    """A converted layer's keys and values, and packed index keys of both levels."""

    def __init__(self, planned: int | None = None) -> None:
        super().__init__(planned)
        self._index_keys, self._coarse_keys = TokenBuffer(planned), TokenBuffer(planned)

    def buffers(self) -> tuple[TokenBuffer, ...]:
        return *super().buffers(), self._index_keys, self._coarse_keys

    def has_coarse_keys(self, width: int) -> bool:
        """Whether all stored tokens have coarse keys of `width` bytes; of no width: whether none has any."""
        tokens = self.get_seq_length() if width else 0
        return self._coarse_keys.length == tokens and (not tokens or self._coarse_keys.width == width)

    def update_coarse(self, packed_BTX: Tensor) -> Tensor:
        """Store coarse keys `[B, T, X]`; return the view `[B, S, X]` of all tokens."""
        return self._coarse_keys.append(packed_BTX)

    def update_indexer(self, indexer_key_states: Tensor) -> Tensor:
        """Store `[B, T, N]`; return the view `[B, S, N]` of all tokens."""
        return self._index_keys.append(indexer_key_states)


def has_states(cache: Cache) -> bool:
    """Whether layers with linear attention are in a cache: of what they have read they forget no part."""
    return any(isinstance(layer, LinearAttentionLayer) for layer in cache.layers)


@contextmanager
def forgotten_after(cache: Any) -> Iterator[None]:
    """What a cache reads in the block it has not read after it."""
    length = cache.get_seq_length()
    states = {
        number: copy.deepcopy(vars(layer))
        for number, layer in enumerate(cache.layers)
        if isinstance(layer, LinearAttentionLayer)
    }
    try:
        yield
    finally:
        for number, layer in enumerate(cache.layers):
            if number in states:
                vars(layer).update(states[number])
            else:
                layer.crop(length - layer.get_seq_length())
