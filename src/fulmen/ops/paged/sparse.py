"""Queries over paged caches: what each keeps is chosen, then attended to; no gradient.

The same as `paged_index_topk` and `paged_attention`, in one call: what lies between is no tensor.
"""

import ctypes
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fulmen.errors import ConfigError
from fulmen.ops.cpp.library import call_native_by_numbers
from fulmen.ops.dispatch import resolve
from fulmen.ops.paged import paged_attention, paged_index_topk
from fulmen.ops.paged.layer import PagedLayer, check_fields


class NativeSequences(ctypes.Structure):
    """`Sequences` of `cpp/src/paged.h`."""

    _fields_ = [
        ("keys", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("rows", "index_rows", "stop")),
    ]


class NativeQueries(ctypes.Structure):
    """`PagedQueries` there."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "count", "threads")),
        *((name, ctypes.c_void_p) for name in ("q", "index_q", "w", "b")),
    ]


@dataclass(frozen=True, eq=False)
class Sequences:
    """Where the keys of each sequence lie, for all layers whose caches are cut alike.

    Attributes:
        rows_BS, index_rows_BS: int32, the rows of both caches in which key s lies (below R).
        stop_BT: int64, keys that each query sees, its own token's the last: 1 to S.

    Raises ConfigError: axes or dtypes that do not fit together.
    """

    rows_BS: Tensor
    index_rows_BS: Tensor
    stop_BT: Tensor

    def __post_init__(self) -> None:
        check_fields(self, rows_BS=torch.int32, index_rows_BS=torch.int32, stop_BT=torch.int64)

    @cached_property
    def longest(self) -> int:
        """The most keys that a query sees."""
        return int(self.stop_BT.max())

    @cached_property
    def native(self) -> NativeSequences:
        """For the kernels; valid as long as this object."""
        return NativeSequences(self.rows_BS.shape[1], *(x.data_ptr() for x in self._held))

    @cached_property
    def _held(self) -> tuple[Tensor, ...]:
        return tuple(x.contiguous() for x in (self.rows_BS, self.index_rows_BS, self.stop_BT))


@torch.no_grad()
def paged_sparse_attention(
    layer: PagedLayer,
    q_BTHD: Tensor,
    index_q_BTJE: Tensor,
    w_BTJ: Tensor,
    b_BTJ: Tensor,
    seen: Sequences,
    out_BTHD: Tensor,
) -> None:
    """Attention of each query over all its keys up to `layer.whole` of them, else over the `layer.topk` best.

    Args:
        q_BTHD, index_q_BTJE, w_BTJ, b_BTJ: queries and index queries, turned, and the indexer's
            weights and shifts; all of the cache's dtype.
        out_BTHD: contiguous, written.

    Raises:
        ConfigError: axes or dtypes that do not fit together.
        BackendError: a pinned backend that cannot run here.
    """
    floats = {"q_BTHD": q_BTHD, "index_q_BTJE": index_q_BTJE, "w_BTJ": w_BTJ, "b_BTJ": b_BTJ}
    _check_inputs(layer, floats | {"out_BTHD": out_BTHD}, seen)
    if resolve("paged_sparse_attention", *layer.place) != "native":
        index = (index_q_BTJE, layer.packed_RX, seen.index_rows_BS, w_BTJ, b_BTJ, seen.stop_BT)
        topk_BTK = paged_index_topk(*index, layer.topk, layer.whole)
        out_BTHD.copy_(
            paged_attention(q_BTHD, layer.kv_RGC, seen.rows_BS, seen.stop_BT, topk_BTK, layer.scale)
        )
        return
    assert out_BTHD.is_contiguous()
    held = [x.contiguous() for x in floats.values()]
    sizes = (*q_BTHD.shape[:2], torch.get_num_threads())
    queries = NativeQueries(*sizes, *(x.data_ptr() for x in held))
    structures = map(ctypes.addressof, (layer.native, queries, seen.native))
    call_native_by_numbers("fulmen_paged_sparse", *structures, out_BTHD.data_ptr())


def _check_inputs(layer: PagedLayer, floats: dict[str, Tensor], seen: Sequences) -> None:
    """Little work if all fits, as it is done for every layer."""
    size, like = seen.stop_BT.shape, layer.kv_RGC
    per_token = (layer.shapes["q"], layer.shapes["index_q"], *[(layer.n_index_heads,)] * 2, layer.shapes["q"])
    for (name, x), numbers in zip(floats.items(), per_token, strict=True):
        if x.shape != (*size, *numbers) or x.dtype is not like.dtype or x.device != like.device:
            raise ConfigError(
                f"{name} has shape {tuple(x.shape)}, {x.dtype}, {x.device}; it must have "
                f"{(*size, *numbers)}, {like.dtype}, {like.device}"
            )
