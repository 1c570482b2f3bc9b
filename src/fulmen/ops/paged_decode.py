"""One decoding step of a layer: one token of each of B sequences, over paged caches; no gradient.

The same as the indexer's projections, `store_tokens`, `paged_index_topk` and `paged_attention`, in one call:
at one token a sequence, some forty small operations would take the most time.
"""

import ctypes
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import linear

from fulmen.errors import ConfigError
from fulmen.ops.checks import check_axes, check_same_device, check_same_dtype
from fulmen.ops.dispatch import resolve
from fulmen.ops.native_library import call_native_by_numbers
from fulmen.ops.paged import paged_attention
from fulmen.ops.paged_layer import NewTokens, PagedLayer, check_pairs, store_tokens
from fulmen.ops.paged_sparse import Sequences, paged_sparse_attention


class NativeProjections(ctypes.Structure):
    """`Projections` of `native/paged.cpp`."""

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

    @cached_property
    def widths(self) -> tuple[int, int]:
        """Of what is projected, per token: queries and keys of all heads, and the hidden state."""
        return self.q_YX.shape[1] + self.k_YX.shape[1], self.w_YC.shape[1]

    @cached_property
    def rows(self) -> tuple[int, ...]:
        """Results of the three matrices."""
        return tuple(len(x) for x in (self.q_YX, self.k_YX, self.w_YC))

    @cached_property
    def native(self) -> NativeProjections:
        """For the kernel; valid as long as this object."""
        widths = (x.shape[1] for x in (self.q_YX, self.k_YX, self.w_YC))
        return NativeProjections(*widths, *(x.data_ptr() for x in self._held))

    @cached_property
    def _held(self) -> tuple[Tensor, ...]:
        matrices = (x.contiguous() for x in (self.q_YX, self.k_YX, self.w_YC))
        return (*matrices, self.bias_Y.float().contiguous())


def paged_decode(
    layer: PagedLayer,
    projections: Projections,
    tokens: NewTokens,
    seen: Sequences,
    qkv_BX: Tensor,
    all_qk_BX: Tensor,
    x_BC: Tensor,
    out_BX: Tensor,
) -> None:
    """Attention of each sequence's new token, whose keys and value are stored first.

    Args:
        tokens: one of each sequence, in the order of `seen`; there T = 1.
        qkv_BX: queries, keys and values before RoPE, head after head: X = (H + 2 G) D; of the cache's dtype.
        all_qk_BX, x_BC: what index heads are made of: queries and keys of all heads, and hidden states. The
            former is `qkv_BX` again, unless this process has but some of the heads; what follows is not read.
        out_BX: contiguous, written: X = H D.

    Raises:
        ConfigError: axes or dtypes that do not fit together.
        BackendError: a pinned backend that cannot run here.
    """
    _check_inputs(layer, projections, tokens, seen, qkv_BX, all_qk_BX, x_BC, out_BX)
    if resolve("paged_decode", *layer.place) != "native":
        inputs = (qkv_BX, all_qk_BX, x_BC)
        out_BX.copy_(_decode_by_parts(layer, projections, tokens, seen, *inputs).flatten(1))
        return
    assert qkv_BX.stride(1) == all_qk_BX.stride(1) == x_BC.stride(1) == 1
    assert out_BX.is_contiguous()
    call_native_by_numbers(
        "fulmen_paged_decode",
        *map(ctypes.addressof, (layer.native, projections.native, tokens.native, seen.native)),
        *(qkv_BX.data_ptr(), qkv_BX.stride(0), all_qk_BX.data_ptr(), all_qk_BX.stride(0)),
        *(x_BC.data_ptr(), x_BC.stride(0), out_BX.data_ptr()),
    )


def _check_inputs(
    layer: PagedLayer,
    projections: Projections,
    tokens: NewTokens,
    seen: Sequences,
    qkv_BX: Tensor,
    all_qk_BX: Tensor,
    x_BC: Tensor,
    out_BX: Tensor,
) -> None:
    """Little work if all fits, as it is done for every layer of every token."""
    if projections.rows != layer.index_rows:
        raise ConfigError(f"projections have {projections.rows} rows; the layer asks for {layer.index_rows}")
    check_pairs(layer, tokens)
    count, dtype = tokens.count, layer.kv_RGC.dtype
    if seen.stop_BT.shape != (count, 1):
        raise ConfigError(
            f"{count} tokens belong to as many sequences of one query; "
            f"stop_BT has shape {tuple(seen.stop_BT.shape)}"
        )
    n_qk, n_x = projections.widths
    _check_input("qkv_BX", qkv_BX, count, layer.qkv_width, dtype)
    _check_input("x_BC", x_BC, count, n_x, dtype)
    _check_input("out_BX", out_BX, count, layer.out_width, dtype)
    if all_qk_BX is not qkv_BX:
        _check_input("all_qk_BX", all_qk_BX, count, max(n_qk, all_qk_BX.shape[-1]), dtype)


def _check_input(name: str, x_BX: Tensor, count: int, width: int, dtype: torch.dtype) -> None:
    if x_BX.shape != (count, width) or x_BX.dtype is not dtype:
        raise ConfigError(
            f"{name} has shape {tuple(x_BX.shape)}, {x_BX.dtype}; it must have ({count}, {width}), {dtype}"
        )


@torch.no_grad()
def _decode_by_parts(
    layer: PagedLayer,
    projections: Projections,
    tokens: NewTokens,
    seen: Sequences,
    qkv_BX: Tensor,
    all_qk_BX: Tensor,
    x_BC: Tensor,
) -> Tensor:
    """The specification, on any device: out_BHD."""
    n_heads, kv_heads, width = layer.n_heads, layer.kv_RGC.shape[1], layer.shapes["q"][1]
    qkv = qkv_BX.unflatten(1, (-1, width)).split((n_heads, kv_heads, kv_heads), 1)
    all_q_BX, all_k_BX, _ = all_qk_BX.tensor_split((projections.q_YX.shape[1], projections.widths[0]), 1)
    index_q_BJE = linear(all_q_BX, projections.q_YX).unflatten(1, layer.shapes["index_q"])
    index_k_BIE = linear(all_k_BX, projections.k_YX).unflatten(1, layer.shapes["index_k"])
    bias_Y = projections.bias_Y.to(projections.w_YC.dtype)
    w_B1J, b_B1J = linear(x_BC, projections.w_YC, bias_Y)[:, None].chunk(2, -1)
    q_BHD, k_BGD, v_BGD = qkv
    q_BHD, index_q_BJE = store_tokens(layer, tokens, q_BHD, k_BGD, v_BGD, index_q_BJE, index_k_BIE)
    if index_q_BJE is None or seen.longest <= layer.whole:
        inputs = (layer.kv_RGC, seen.rows_BS, seen.stop_BT, None, layer.scale)
        return paged_attention(q_BHD[:, None], *inputs)[:, 0]
    out_BHD = torch.empty_like(q_BHD)
    index = (index_q_BJE[:, None], w_B1J, b_B1J)
    paged_sparse_attention(layer, q_BHD[:, None], *index, seen, out_BHD[:, None])
    return out_BHD
