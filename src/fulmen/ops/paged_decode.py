"""One decoding step of a layer: one token of each of B sequences, over paged caches; no gradient.

The same as `store_tokens`, `paged_index_topk` and `paged_attention`, in one call: at one token a sequence,
some forty small operations would take the most time.
"""

import ctypes
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fulmen.errors import ConfigError
from fulmen.ops.dispatch import resolve
from fulmen.ops.native_library import call_native
from fulmen.ops.paged import paged_attention, paged_index_topk
from fulmen.ops.paged_layer import (
    NewTokens,
    PagedLayer,
    check_fields,
    check_heads,
    native_heads,
    store_tokens,
)


class _NativeSequences(ctypes.Structure):
    """`Sequences` of `native/paged.cpp`."""

    _fields_ = [
        ("keys", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("rows", "index_rows", "stop")),
    ]


@dataclass(frozen=True, eq=False)
class Sequences:
    """Where the keys of each sequence lie, for all layers whose caches are cut alike.

    Attributes:
        rows_BS, index_rows_BS: int32, the rows of both caches in which key s lies (below R).
        stop_B: int64, keys of each sequence with the new token, which is the last: 1 to S.

    Raises ConfigError: axes or dtypes that do not fit together.
    """

    rows_BS: Tensor
    index_rows_BS: Tensor
    stop_B: Tensor

    def __post_init__(self) -> None:
        check_fields(self, rows_BS=torch.int32, index_rows_BS=torch.int32, stop_B=torch.int64)

    @cached_property
    def longest(self) -> int:
        """The most keys that a sequence has."""
        return int(self.stop_B.max())

    @cached_property
    def native(self) -> _NativeSequences:
        """For the kernel; valid as long as this object."""
        return _NativeSequences(self.rows_BS.shape[1], *(x.data_ptr() for x in self._held))

    @cached_property
    def _held(self) -> tuple[Tensor, ...]:
        return tuple(x.contiguous() for x in (self.rows_BS, self.index_rows_BS, self.stop_B))


@torch.no_grad()
def paged_decode(
    layer: PagedLayer,
    tokens: NewTokens,
    seen: Sequences,
    q_BHD: Tensor,
    k_BGD: Tensor,
    v_BGD: Tensor,
    index_q_BJE: Tensor | None,
    index_k_BIE: Tensor,
    w_BJ: Tensor | None,
    b_BJ: Tensor | None,
) -> Tensor:
    """out_BHD, the attention of each sequence's new token, whose keys and value are stored first.

    Args:
        tokens: one of each sequence, in the order of `seen`.
        q_BHD, k_BGD, v_BGD, index_q_BJE, index_k_BIE: before RoPE, of the cache's dtype.
        index_q_BJE, w_BJ, b_BJ: all, or None where no sequence has more than `layer.whole` keys.

    Raises:
        ConfigError: axes or dtypes that do not fit together, or no index queries where they are needed.
        BackendError: a pinned backend that cannot run here.
    """
    heads = {"q": q_BHD, "k": k_BGD, "v": v_BGD, "index_q": index_q_BJE, "index_k": index_k_BIE}
    weights = {"w": w_BJ, "b": b_BJ}
    check_heads(layer, tokens, heads | weights)
    if len({x is None for x in (index_q_BJE, w_BJ, b_BJ)}) > 1 or len(seen.stop_B) != len(q_BHD):
        raise ConfigError(
            f"index_q, w and b belong together, and {len(q_BHD)} tokens to as many sequences, "
            f"not {len(seen.stop_B)}; pass all of them"
        )
    if index_q_BJE is None and seen.longest > layer.whole:
        raise ConfigError(f"a sequence has {seen.longest} keys, more than {layer.whole}; pass index queries")
    if resolve("paged_decode", *layer.place) == "native":
        return _decode_natively(layer, tokens, seen, heads, weights)
    q_BHD, index_q_BJE = store_tokens(layer, tokens, q_BHD, k_BGD, v_BGD, index_q_BJE, index_k_BIE)
    stop_B1 = seen.stop_B[:, None]
    topk_B1K = None
    if index_q_BJE is not None and w_BJ is not None and b_BJ is not None:
        inputs = (layer.packed_RX, seen.index_rows_BS, w_BJ[:, None], b_BJ[:, None])
        topk_B1K = paged_index_topk(index_q_BJE[:, None], *inputs, stop_B1, layer.topk, layer.whole)
    return paged_attention(q_BHD[:, None], layer.kv_RGC, seen.rows_BS, stop_B1, topk_B1K, layer.scale)[:, 0]


def _decode_natively(
    layer: PagedLayer,
    tokens: NewTokens,
    seen: Sequences,
    heads: dict[str, Tensor | None],
    weights: dict[str, Tensor | None],
) -> Tensor:
    q_BHD, w_BJ, b_BJ = heads["q"], weights["w"], weights["b"]
    assert q_BHD is not None
    if w_BJ is not None and b_BJ is not None and w_BJ.stride() != b_BJ.stride():
        weights = {"w": w_BJ.contiguous(), "b": b_BJ.contiguous()}
    places, held = native_heads(heads | weights)
    out_BHD = torch.empty(q_BHD.shape, dtype=q_BHD.dtype)
    w_stride = 0 if (w := weights["w"]) is None else w.stride(1)
    call_native("fulmen_paged_decode", layer.native, tokens.native, seen.native, places, w_stride, out_BHD)
    del held
    return out_BHD
