"""The new tokens of a layer: what its indexer makes of them, RoPE, and what is stored; no gradient.

The same as three matrix products and `store_tokens`. By matrix tiles it is one pass over the tokens.
"""

import ctypes
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from fulmen.errors import ConfigError
from fulmen.ops.common.checks import check_axes, check_same_device, check_same_dtype
from fulmen.ops.cpp.abi import ProjectionsStruct
from fulmen.ops.cpp.library import call_cpp_by_numbers, has_tiles
from fulmen.ops.dispatch import CACHE_DTYPES, implementation, implements
from fulmen.ops.paged.layer import (
    NewTokens,
    PagedLayer,
    check_pairs,
    require_coarse,
    store_tokens,
)


@dataclass(frozen=True, eq=False)
class Projections:
    """What makes a layer's index heads of its own.

    Attributes:
        q_YX: of all query heads to J * E numbers; k_YX: of all key heads to I * E.
        w_YC: of the hidden state to J weights, J shifts and, for an index in two levels, M coarse shifts;
            bias_Y: added to those.
        coarse_q_YX: of all query heads to M * N numbers; coarse_k_YX: of all key heads to N.

    Raises ConfigError: axes or dtypes that do not fit together.
    """

    q_YX: Tensor
    k_YX: Tensor
    w_YC: Tensor
    bias_Y: Tensor
    coarse_q_YX: Tensor | None = None
    coarse_k_YX: Tensor | None = None

    def __post_init__(self) -> None:
        matrices = {"q_YX": self.q_YX, "k_YX": self.k_YX, "w_YC": self.w_YC}
        if self.coarse_q_YX is not None and self.coarse_k_YX is not None:
            matrices |= {"coarse_q_YX": self.coarse_q_YX, "coarse_k_YX": self.coarse_k_YX}
            check_axes(q_YX=self.q_YX[:1], coarse_q_YX=self.coarse_q_YX[:1])
            check_axes(k_YX=self.k_YX[:1], coarse_k_YX=self.coarse_k_YX[:1])
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
        """Results of the matrices."""
        coarse = (self.coarse_q_YX, self.coarse_k_YX)
        return tuple(len(x) for x in (self.q_YX, self.k_YX, self.w_YC, *coarse) if x is not None)

    @cached_property
    def struct(self) -> ProjectionsStruct:
        """For the kernel; valid as long as this object."""
        widths = (x.shape[1] for x in (self.q_YX, self.k_YX, self.w_YC))
        return ProjectionsStruct(*widths, *(x if x is None else x.data_ptr() for x in self._held))

    @cached_property
    def _held(self) -> tuple[Tensor | None, ...]:
        all_matrices = (self.q_YX, self.k_YX, self.w_YC, self.coarse_q_YX, self.coarse_k_YX)
        matrices = (x if x is None else x.contiguous() for x in all_matrices)
        return (*matrices, self.bias_Y.float().contiguous())


class NewIndexQueries(NamedTuple):
    """What a step's tokens select by: index queries, rotated, weights and shifts, in the model's dtype.

    coarse_q_TMN, coarse_b_TM: the same of the coarse level; None where the index has one level, or where no
        query sees so many keys that it is asked.
    """

    q_TJE: Tensor
    w_TJ: Tensor
    b_TJ: Tensor
    coarse_q_TMN: Tensor | None = None
    coarse_b_TM: Tensor | None = None


@torch.no_grad()
def project_and_store(
    layer: PagedLayer,
    projections: Projections,
    tokens: NewTokens,
    qkv_TX: Tensor,
    all_qk_TX: Tensor,
    x_TC: Tensor,
    longest: int,
) -> tuple[Tensor, NewIndexQueries | None]:
    """Store keys, values and index keys of both levels; return q_THD, rotated, and what they select by.

    Args:
        qkv_TX: queries, keys and values before RoPE, head after head: X = (H + 2 G) D; of the cache's dtype.
        all_qk_TX, x_TC: what index heads are made of: queries and keys of all heads, and hidden states. The
            former is `qkv_TX` again, unless this process has but some of the heads; what follows is not read.
        longest: at least the keys that any of the tokens sees. Of what selects among so many, all is made.

    Raises:
        ConfigError: axes or dtypes that do not fit together.
        BackendError: a pinned backend that cannot run here.
    """
    check_projected(layer, projections, tokens, qkv_TX, all_qk_TX, x_TC)
    backend = implementation("project_and_store", *layer.device_and_dtype)
    return backend.run(layer, projections, tokens, qkv_TX, all_qk_TX, x_TC, longest)


@implements("project_and_store", "cpp", dtypes=CACHE_DTYPES)
def project_and_store_cpp(
    layer: PagedLayer,
    projections: Projections,
    tokens: NewTokens,
    qkv_TX: Tensor,
    all_qk_TX: Tensor,
    x_TC: Tensor,
    longest: int,
) -> tuple[Tensor, NewIndexQueries | None]:
    """By matrix tiles, where the CPU has them and numbers are bfloat16; else torch multiplies."""
    inputs = (qkv_TX, all_qk_TX, x_TC)
    if not has_tiles() or layer.kv_RGC.dtype != torch.bfloat16:
        return project_and_store_composed(layer, projections, tokens, *inputs, longest)
    count, heads, new = tokens.count, layer.n_index_heads, qkv_TX.new_empty
    q_THD = new(count, *layer.shapes["q"])
    index = None
    if layer.selects(longest):
        parts: list[Tensor] = [new(count, *layer.shapes["index_q"]), new(count, heads), new(count, heads)]
        if layer.asks_coarse(longest):
            parts += (new(count, *layer.shapes["coarse_q"]), new(count, layer.coarse_heads))
        index = NewIndexQueries(*parts)
    call_cpp_by_numbers(
        "fulmen_paged_project",
        *map(ctypes.addressof, (layer.struct, projections.struct, tokens.struct)),
        *(number for x in inputs for number in (x.data_ptr(), x.stride(0))),
        *(
            q_THD.data_ptr(),
            *([0] * 5 if index is None else (0 if x is None else x.data_ptr() for x in index)),
        ),
    )
    return q_THD, index


@implements("project_and_store", "reference", "torch", "triton")
def project_and_store_composed(
    layer: PagedLayer,
    projections: Projections,
    tokens: NewTokens,
    qkv_TX: Tensor,
    all_qk_TX: Tensor,
    x_TC: Tensor,
    longest: int,
) -> tuple[Tensor, NewIndexQueries | None]:
    """The specification, on any device."""
    n_heads, kv_heads, width = layer.n_heads, layer.kv_RGC.shape[1], layer.shapes["q"][1]
    q_THD, k_TGD, v_TGD = qkv_TX.unflatten(1, (-1, width)).split((n_heads, kv_heads, kv_heads), 1)
    all_q_TX, all_k_TX, _ = all_qk_TX.tensor_split((projections.q_YX.shape[1], projections.widths[0]), 1)
    index_k_TIE = linear(all_k_TX, projections.k_YX).unflatten(1, layer.shapes["index_k"])
    coarse_k_TN = None if projections.coarse_k_YX is None else linear(all_k_TX, projections.coarse_k_YX)
    if not layer.selects(longest):
        keys = (index_k_TIE, None, coarse_k_TN)
        return store_tokens(layer, tokens, q_THD, k_TGD, v_TGD, None, *keys)[0], None
    index_q_TJE = linear(all_q_TX, projections.q_YX).unflatten(1, layer.shapes["index_q"])
    coarse_q_TMN = None
    if layer.asks_coarse(longest):
        assert projections.coarse_q_YX is not None
        coarse_q_TMN = linear(all_q_TX, projections.coarse_q_YX).unflatten(1, layer.shapes["coarse_q"])
    bias_Y = projections.bias_Y.to(projections.w_YC.dtype)
    n_index_heads = layer.n_index_heads
    w_TJ, b_TJ, coarse_b_TM = linear(x_TC, projections.w_YC, bias_Y).tensor_split(
        (n_index_heads, 2 * n_index_heads), -1
    )
    index = (index_q_TJE, index_k_TIE, coarse_q_TMN, coarse_k_TN)
    q_THD, rotated_TJE, coarse_q_TMN = store_tokens(layer, tokens, q_THD, k_TGD, v_TGD, *index)
    assert rotated_TJE is not None
    if coarse_q_TMN is None:
        return q_THD, NewIndexQueries(rotated_TJE, w_TJ, b_TJ)
    return q_THD, NewIndexQueries(rotated_TJE, w_TJ, b_TJ, coarse_q_TMN, coarse_b_TM)


def check_projected(
    layer: PagedLayer,
    projections: Projections,
    tokens: NewTokens,
    qkv_TX: Tensor,
    all_qk_TX: Tensor,
    x_TC: Tensor,
) -> None:
    """Raise ConfigError unless the new tokens' numbers fit; little work, as it is done for every layer."""
    if projections.rows != layer.index_rows:
        raise ConfigError(f"projections have {projections.rows} rows; the layer asks for {layer.index_rows}")
    check_pairs(layer, tokens)
    require_coarse(layer, tokens.coarse_rows_T, "coarse_rows_T")
    count, dtype = tokens.count, layer.kv_RGC.dtype
    n_qk, n_x = projections.widths
    check_rows("qkv_TX", qkv_TX, count, layer.qkv_width, dtype)
    check_rows("x_TC", x_TC, count, n_x, dtype)
    if all_qk_TX is not qkv_TX:
        check_rows("all_qk_TX", all_qk_TX, count, max(n_qk, all_qk_TX.shape[-1]), dtype)


def check_rows(name: str, x_TX: Tensor, count: int, width: int, dtype: torch.dtype) -> None:
    """Raise ConfigError unless there are `count` rows of as many numbers, side by side."""
    if x_TX.shape != (count, width) or x_TX.dtype is not dtype:
        raise ConfigError(
            f"{name} has shape {tuple(x_TX.shape)}, {x_TX.dtype}; it must have ({count}, {width}), {dtype}"
        )
    assert x_TX.stride(1) == 1 or width == 1
