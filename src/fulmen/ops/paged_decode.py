"""One decoding step of a layer: one token of each of B sequences, over paged caches; no gradient.

The same as the indexer's projections, `store_tokens`, `paged_index_topk` and `paged_attention`, in one call:
at one token a sequence, some forty small operations would take the most time.
"""

import ctypes
import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import linear

from fulmen.errors import ConfigError
from fulmen.ops.checks import check_axes, check_same_device, check_same_dtype
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


class NativeProjections(ctypes.Structure):
    """`Projections` there."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("q_width", "k_width", "x_width")),
        *((name, ctypes.c_void_p) for name in ("q", "k", "w_and_b", "bias")),
    ]


@dataclass(frozen=True, eq=False)
class Projections:
    """What makes a layer's index heads of its own.

    Attributes:
        q_YX: of all query heads to J * E numbers; k_YX: of all key heads to I * E.
        w_YC: of the hidden state to J weights and J shifts; bias_Y: added to those.

    Raises ConfigError: axes or dtypes that do not fit together.
    """

    q_YX: Tensor
    k_YX: Tensor
    w_YC: Tensor
    bias_Y: Tensor

    def __post_init__(self) -> None:
        matrices = {"q_YX": self.q_YX, "k_YX": self.k_YX, "w_YC": self.w_YC}
        for name, x in matrices.items():
            check_axes(**{name: x})  # each with a Y of its own
        check_same_dtype(**matrices)
        check_axes(w_YC=self.w_YC, bias_Y=self.bias_Y)
        check_same_device(**matrices, bias_Y=self.bias_Y)

    def shapes(self, layer: PagedLayer) -> dict[str, tuple[int, ...]]:
        """Of what is projected, per token. Raises ConfigError for projections of another layer's shape."""
        rows = [math.prod(layer.shapes[name]) for name in ("index_q", "index_k")] + [2 * layer.n_index_heads]
        if [len(x) for x in (self.q_YX, self.k_YX, self.w_YC)] != rows:
            raise ConfigError(
                f"projections have {len(self.q_YX)}, {len(self.k_YX)}, {len(self.w_YC)} rows; "
                f"the layer asks for {rows[0]}, {rows[1]}, {rows[2]}"
            )
        inputs = {"all_q": self.q_YX, "all_k": self.k_YX, "x": self.w_YC}
        return {name: (matrix.shape[1],) for name, matrix in inputs.items()}

    @cached_property
    def native(self) -> NativeProjections:
        """For the kernel; valid as long as this object."""
        widths = (x.shape[1] for x in (self.q_YX, self.k_YX, self.w_YC))
        return NativeProjections(*widths, *(x.data_ptr() for x in self._held))

    @cached_property
    def _held(self) -> tuple[Tensor, ...]:
        matrices = (x.contiguous() for x in (self.q_YX, self.k_YX, self.w_YC))
        return (*matrices, self.bias_Y.float().contiguous())


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
    projections: Projections,
    tokens: NewTokens,
    seen: Sequences,
    q_BHD: Tensor,
    k_BGD: Tensor,
    v_BGD: Tensor,
    all_q_BX: Tensor,
    all_k_BX: Tensor,
    x_BC: Tensor,
) -> Tensor:
    """out_BHD, the attention of each sequence's new token, whose keys and value are stored first.

    Args:
        tokens: one of each sequence, in the order of `seen`.
        q_BHD, k_BGD, v_BGD: before RoPE, of the cache's dtype.
        all_q_BX, all_k_BX, x_BC: what the index heads are made of: queries and keys of all heads (where this
            process has some of them only, more than q and k), and hidden states.

    Raises:
        ConfigError: axes or dtypes that do not fit together.
        BackendError: a pinned backend that cannot run here.
    """
    heads = {"q": q_BHD, "k": k_BGD, "v": v_BGD}
    inputs = {"all_q": all_q_BX, "all_k": all_k_BX, "x": x_BC}
    check_heads(layer, tokens, heads, layer.shapes)
    check_heads(layer, tokens, inputs, projections.shapes(layer))
    if len(seen.stop_B) != len(q_BHD):
        raise ConfigError(f"{len(q_BHD)} tokens belong to as many sequences, not {len(seen.stop_B)}")
    if resolve("paged_decode", *layer.place) != "native":
        return _decode_by_parts(layer, projections, tokens, seen, heads, inputs)
    places, held = native_heads(heads | inputs)
    out_BHD = torch.empty(q_BHD.shape, dtype=q_BHD.dtype)
    native = (layer.native, projections.native, tokens.native, seen.native)
    call_native("fulmen_paged_decode", *native, places, out_BHD)
    del held
    return out_BHD


def _decode_by_parts(
    layer: PagedLayer,
    projections: Projections,
    tokens: NewTokens,
    seen: Sequences,
    heads: dict[str, Tensor],
    inputs: dict[str, Tensor],
) -> Tensor:
    """The specification, on any device."""
    index_k_BIE = linear(inputs["all_k"], projections.k_YX).unflatten(1, layer.shapes["index_k"])
    index_q_BJE = linear(inputs["all_q"], projections.q_YX).unflatten(1, layer.shapes["index_q"])
    bias_Y = projections.bias_Y.to(projections.w_YC.dtype)
    w_B1J, b_B1J = linear(inputs["x"], projections.w_YC, bias_Y)[:, None].chunk(2, -1)
    qkv = (heads["q"], heads["k"], heads["v"])
    q_BHD, index_q_BJE = store_tokens(layer, tokens, *qkv, index_q_BJE, index_k_BIE)
    stop_B1, topk_B1K = seen.stop_B[:, None], None
    if index_q_BJE is not None and seen.longest > layer.whole:
        index = (index_q_BJE[:, None], layer.packed_RX, seen.index_rows_BS, w_B1J, b_B1J, stop_B1)
        topk_B1K = paged_index_topk(*index, layer.topk, layer.whole)
    return paged_attention(q_BHD[:, None], layer.kv_RGC, seen.rows_BS, stop_B1, topk_B1K, layer.scale)[:, 0]
