"""Queries over paged caches: what each keeps is chosen, then attended to; no gradient.

The same as `paged_index_topk` and `paged_attention`, in one call: what lies between is no tensor.
"""

import ctypes
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fulmen.errors import ConfigError
from fulmen.ops.checks import check_axes, check_same_device, check_same_dtype
from fulmen.ops.dispatch import resolve
from fulmen.ops.native_library import call_native
from fulmen.ops.paged import paged_attention, paged_index_topk
from fulmen.ops.paged_layer import PagedLayer, check_fields


class NativeSequences(ctypes.Structure):
    """`Sequences` of `native/paged.h`."""

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
    _check_inputs(layer, floats, seen, out_BTHD)
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
    call_native("fulmen_paged_sparse", layer.native, queries, seen.native, out_BTHD)


def _check_inputs(layer: PagedLayer, floats: dict[str, Tensor], seen: Sequences, out_BTHD: Tensor) -> None:
    check_axes(**floats, stop_BT=seen.stop_BT, out_BTHD=out_BTHD)
    check_same_dtype(kv_RGC=layer.kv_RGC, **floats, out_BTHD=out_BTHD)
    check_same_device(kv_RGC=layer.kv_RGC, **floats, out_BTHD=out_BTHD)
    for name, x in (("q", floats["q_BTHD"]), ("index_q", floats["index_q_BTJE"])):
        if x.shape[2:] != layer.shapes[name]:
            raise ConfigError(
                f"{name} has heads of shape {tuple(x.shape[2:])}; the layer asks for {layer.shapes[name]}"
            )
