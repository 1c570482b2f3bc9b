"""A layer's paged caches and the tokens of a step that go into them; no gradient.

What these tokens need before attention, as one operation: RoPE for queries, keys and the indexer's, and
storing keys, values and packed index keys.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fulmen.errors import ConfigError
from fulmen.ops.common.checks import (
    check_axes,
    check_integer,
    check_multiple,
    check_same_device,
    check_same_dtype,
    check_softmax_changes,
)
from fulmen.ops.common.index_keys import SCALE_BYTES, is_packed
from fulmen.ops.common.rope import apply_rope, rotate_half_split
from fulmen.ops.cpp.abi import HeadsStruct, NewTokensStruct, PagedLayerStruct
from fulmen.ops.cpp.library import call_cpp, has_tiles
from fulmen.ops.dispatch import CACHE_DTYPES, implementation, implements, implements_by_name
from fulmen.ops.paged import store_index_keys


@dataclass(frozen=True, eq=False)
class CoarseCache:
    """The first level of a layer's index (`fulmen.ops.two_level`).

    Attributes:
        packed_RX: int8, the cache of coarse keys, X = N + 2; written in place.
        rope_pairs_P: int64, of each pair of N / 2 the rotary pair that rotates it; their number: none does.
        n_heads: heads of its queries (M).
        n_candidates: keys that it leaves to the indexer.
        all_up_to: of a query that sees no more keys than this it leaves all; at least `n_candidates`.

    Raises ConfigError: axes or dtypes that do not fit together.
    """

    packed_RX: Tensor
    rope_pairs_P: Tensor
    n_heads: int
    n_candidates: int
    all_up_to: int

    def __post_init__(self) -> None:
        check_axes(packed_RX=self.packed_RX, rope_pairs_P=self.rope_pairs_P)
        check_integer(rope_pairs_P=self.rope_pairs_P)
        check_same_device(packed_RX=self.packed_RX, rope_pairs_P=self.rope_pairs_P)
        if not is_packed(self.packed_RX) or self.packed_RX.shape[1] != self.width + SCALE_BYTES:
            raise ConfigError(
                f"packed_RX of coarse keys has dtype {self.packed_RX.dtype} and X={self.packed_RX.shape[1]}; "
                f"rope_pairs_P asks for int8 and X={self.width + SCALE_BYTES}"
            )

    @property
    def numbers(self) -> tuple[int, int, int]:
        """As in `PagedLayerStruct`."""
        return self.n_candidates, max(self.all_up_to, self.n_candidates), self.packed_RX.stride(0)

    @cached_property
    def width(self) -> int:
        """Numbers of a coarse key (N)."""
        return 2 * len(self.rope_pairs_P)


@dataclass(frozen=True, eq=False)
class PagedLayer:
    """What stays the same from step to step.

    Attributes:
        kv_RGC: the cache of keys and values, C = 2 D: a head's key, then its value; written in place.
        packed_RX: int8, the cache of index keys, X = I * (E + 2); written in place.
        rope_pairs_IP: int64, of each index pair the rotary pair that rotates it; their number: none does.
        n_heads, n_index_heads: H and J.
        topk: keys that a query keeps of more than `dense_up_to`; up to those it keeps all.
        scale: of the attention's logits.
        coarse: of an index in two levels.
        softcap, sinks_H: of the attention, as `fulmen.ops.attention.sparse.sparse_attention`.

    Raises ConfigError: axes or dtypes that do not fit together.
    """

    kv_RGC: Tensor
    packed_RX: Tensor
    rope_pairs_IP: Tensor
    n_heads: int
    n_index_heads: int
    topk: int
    dense_up_to: int
    scale: float
    coarse: CoarseCache | None = None
    softcap: float | None = None
    sinks_H: Tensor | None = None

    def __post_init__(self) -> None:
        check_axes(kv_RGC=self.kv_RGC, rope_pairs_IP=self.rope_pairs_IP)
        check_axes(packed_RX=self.packed_RX)  # with as many rows as it needs
        check_same_dtype(kv_RGC=self.kv_RGC)
        check_integer(rope_pairs_IP=self.rope_pairs_IP)
        check_same_device(kv_RGC=self.kv_RGC, packed_RX=self.packed_RX, rope_pairs_IP=self.rope_pairs_IP)
        check_multiple({"H": self.n_heads, "G": self.kv_RGC.shape[1]}, "H", "G")
        check_multiple({"J": self.n_index_heads, "I": self.rope_pairs_IP.shape[0]}, "J", "I")
        check_softmax_changes(self.kv_RGC.new_empty(0, 0, *self.shapes["q"]), self.softcap, self.sinks_H)
        width = self.rope_pairs_IP.shape[0] * (2 * self.rope_pairs_IP.shape[1] + SCALE_BYTES)
        if not is_packed(self.packed_RX) or self.packed_RX.shape[1] != width:
            raise ConfigError(
                f"packed_RX has dtype {self.packed_RX.dtype} and X={self.packed_RX.shape[1]}; "
                f"rope_pairs_IP asks for int8 and X={width}"
            )

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the heads of one token, by the names that `store_tokens` has for them."""
        key_heads, width = self.kv_RGC.shape[1], self.kv_RGC.shape[2] // 2
        index_key_heads, pairs = self.rope_pairs_IP.shape
        return {
            **{"q": (self.n_heads, width), "k": (key_heads, width), "v": (key_heads, width)},
            **{"index_q": (self.n_index_heads, 2 * pairs), "index_k": (index_key_heads, 2 * pairs)},
            **{"coarse_q": (self.coarse_heads, self.coarse_width), "coarse_k": (self.coarse_width,)},
        }

    @cached_property
    def coarse_width(self) -> int:
        """Numbers of a coarse key; 0 where the index has one level."""
        return 0 if self.coarse is None else self.coarse.width

    def selects(self, n_keys: int) -> bool:
        """Whether a query that sees so many keys keeps but some of them."""
        return n_keys > self.dense_up_to

    def asks_coarse(self, n_keys: int) -> bool:
        """Whether it has candidates; if not, no coarse query is read."""
        return self.coarse is not None and n_keys > self.coarse.numbers[1]

    @cached_property
    def coarse_heads(self) -> int:
        """Heads of coarse queries; 0 where the index has one level."""
        return 0 if self.coarse is None else self.coarse.n_heads

    @cached_property
    def qkv_width(self) -> int:
        """Numbers of a token's queries, keys and values."""
        return (self.n_heads + 2 * self.kv_RGC.shape[1]) * self.shapes["q"][1]

    @cached_property
    def out_width(self) -> int:
        """Numbers of a token's attention."""
        return self.n_heads * self.shapes["q"][1]

    @cached_property
    def index_rows(self) -> tuple[int, ...]:
        """Numbers of a token's index queries, index keys, weights with shifts, coarse queries and keys."""
        (heads, width), (key_heads, _) = self.shapes["index_q"], self.shapes["index_k"]
        index = (heads * width, key_heads * width, 2 * heads + self.coarse_heads)
        return (
            index
            if self.coarse is None
            else (*index, self.coarse_heads * self.coarse_width, self.coarse_width)
        )

    @cached_property
    def device_and_dtype(self) -> tuple[torch.device, torch.dtype]:
        """Device and dtype of the cache, which choose the backend."""
        return self.kv_RGC.device, self.kv_RGC.dtype

    @property
    def softmax(self) -> tuple[float, float | None, Tensor | None]:
        """What attention does with products of queries and keys: scale, softcap and sinks_H."""
        return self.scale, self.softcap, self.sinks_H

    @cached_property
    def struct(self) -> PagedLayerStruct:
        """For the kernels; valid as long as this object."""
        assert self.kv_RGC.stride(2) == self.packed_RX.stride(1) == 1
        assert self.rope_pairs_IP.is_contiguous()
        heads, index_heads, index_key_heads = (self.shapes[name] for name in ("q", "index_q", "index_k"))
        coarse = self.coarse
        if coarse is not None:
            assert coarse.packed_RX.stride(1) == 1
            assert coarse.rope_pairs_P.is_contiguous()
        return PagedLayerStruct(
            *(heads[0], self.kv_RGC.shape[1], heads[1], index_heads[0], *index_key_heads),
            *(self.topk, self.dense_up_to, self.kv_RGC.dtype == torch.bfloat16, *self.kv_RGC.stride()[:2]),
            *(self.packed_RX.stride(0), has_tiles(), self.coarse_heads, self.coarse_width),
            *((0, 0, 0) if coarse is None else coarse.numbers),
            *(self.kv_RGC.data_ptr(), self.packed_RX.data_ptr(), self.rope_pairs_IP.data_ptr()),
            *(
                (None, None)
                if coarse is None
                else (coarse.packed_RX.data_ptr(), coarse.rope_pairs_P.data_ptr())
            ),
            *(
                None if self._held_sinks is None else self._held_sinks.data_ptr(),
                self.scale,
                self.softcap or 0,
            ),
        )

    @cached_property
    def _held_sinks(self) -> Tensor | None:
        return None if self.sinks_H is None else self.sinks_H.detach().float().contiguous()


@dataclass(frozen=True, eq=False)
class NewTokens:
    """The tokens of a step, for all layers whose caches are cut alike.

    Attributes:
        rows_T, index_rows_T: int64, the rows of both caches that they go to (below R).
        cos_TP, sin_TP: of each rotary pair, in the model's dtype.
        coarse_rows_T: int64, the rows of the cache of coarse keys, of an index in two levels.

    Raises ConfigError: axes or dtypes that do not fit together.
    """

    rows_T: Tensor
    index_rows_T: Tensor
    cos_TP: Tensor
    sin_TP: Tensor
    coarse_rows_T: Tensor | None = None

    def __post_init__(self) -> None:
        check_fields(self, rows_T=torch.int64, index_rows_T=torch.int64, coarse_rows_T=torch.int64)
        check_same_dtype(cos_TP=self.cos_TP, sin_TP=self.sin_TP)

    @cached_property
    def struct(self) -> NewTokensStruct:
        """For the kernels; valid as long as this object."""
        sizes = (*self.cos_TP.shape, torch.get_num_threads())
        return NewTokensStruct(*sizes, *(x if x is None else x.data_ptr() for x in self._held))

    @cached_property
    def count(self) -> int:
        """How many."""
        return len(self.rows_T)

    @cached_property
    def _held(self) -> tuple[Tensor | None, ...]:
        all_rows = (self.rows_T, self.index_rows_T, self.coarse_rows_T)
        rows = (x if x is None else x.contiguous() for x in all_rows)
        return (*rows, *(x.float().contiguous() for x in (self.cos_TP, self.sin_TP)))


@torch.no_grad()
def store_tokens(
    layer: PagedLayer,
    tokens: NewTokens,
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    index_q_TJE: Tensor | None,
    index_k_TIE: Tensor,
    coarse_q_TMN: Tensor | None = None,
    coarse_k_TN: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Store keys, values and index keys of both levels; return the queries, rotated.

    Args: all before RoPE, of the cache's dtype; coarse ones where the layer's index has two levels.

    Returns:
        q_THD, index_q_TJE and coarse_q_TMN; None for what was not given.

    Raises:
        ConfigError: axes or dtypes that do not fit together.
        BackendError: a pinned backend that cannot run here.
    """
    heads = {"q": q_THD, "k": k_TGD, "v": v_TGD, "index_q": index_q_TJE, "index_k": index_k_TIE}
    _check_heads(layer, tokens, heads | {"coarse_q": coarse_q_TMN, "coarse_k": coarse_k_TN})
    backend = implementation("store_tokens", *layer.device_and_dtype)
    return backend.run(layer, tokens, *heads.values(), coarse_q_TMN, coarse_k_TN)


@implements("store_tokens", "cpp", dtypes=CACHE_DTYPES)
def store_tokens_cpp(
    layer: PagedLayer,
    tokens: NewTokens,
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    index_q_TJE: Tensor | None,
    index_k_TIE: Tensor,
    coarse_q_TMN: Tensor | None = None,
    coarse_k_TN: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """By the C++ kernel."""
    heads = (q_THD, k_TGD, v_TGD, index_q_TJE, index_k_TIE, coarse_q_TMN, coarse_k_TN)
    out_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype)
    index_out_TJE = None if index_q_TJE is None else torch.empty(index_q_TJE.shape, dtype=q_THD.dtype)
    coarse_out_TMN = None if coarse_q_TMN is None else torch.empty(coarse_q_TMN.shape, dtype=q_THD.dtype)
    rows, held = _head_rows(heads)
    call_cpp("fulmen_paged_store", layer.struct, tokens.struct, rows, out_THD, index_out_TJE, coarse_out_TMN)
    del held
    return out_THD, index_out_TJE, coarse_out_TMN


@implements("store_tokens", "reference", "torch")
def store_tokens_composed(
    layer: PagedLayer,
    tokens: NewTokens,
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    index_q_TJE: Tensor | None,
    index_k_TIE: Tensor,
    coarse_q_TMN: Tensor | None = None,
    coarse_k_TN: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The specification, on any device."""
    cos_TR, sin_TR = (torch.cat((x_TP, x_TP), -1) for x_TP in (tokens.cos_TP, tokens.sin_TP))
    q_THD, k_TGD = apply_rope(q_THD, cos_TR, sin_TR), apply_rope(k_TGD, cos_TR, sin_TR)
    layer.kv_RGC[tokens.rows_T] = torch.cat((k_TGD, v_TGD), -1)
    still_T1 = tokens.cos_TP.new_ones(len(tokens.cos_TP), 1)
    cos_TIP = torch.cat((tokens.cos_TP, still_T1), -1)[:, layer.rope_pairs_IP]
    sin_TIP = torch.cat((tokens.sin_TP, still_T1 - 1), -1)[:, layer.rope_pairs_IP]
    store_index_keys(rotate_half_split(index_k_TIE, cos_TIP, sin_TIP), layer.packed_RX, tokens.index_rows_T)
    coarse_q_TMN = _store_coarse(layer, tokens, coarse_q_TMN, coarse_k_TN)
    if index_q_TJE is None:
        return q_THD, None, None
    shared = layer.n_index_heads // len(layer.rope_pairs_IP)
    angles = (x_TIP.repeat_interleave(shared, 1) for x_TIP in (cos_TIP, sin_TIP))
    return q_THD, rotate_half_split(index_q_TJE, *angles), coarse_q_TMN


implements_by_name("store_tokens", "triton", "fulmen.ops.paged.triton_store:store_tokens_triton")


def _store_coarse(
    layer: PagedLayer, tokens: NewTokens, coarse_q_TMN: Tensor | None, coarse_k_TN: Tensor | None
) -> Tensor | None:
    """Coarse keys into their cache; the queries, rotated."""
    if layer.coarse is None or coarse_k_TN is None:
        return None
    assert tokens.coarse_rows_T is not None
    still_T1 = tokens.cos_TP.new_ones(len(tokens.cos_TP), 1)
    pairs_P = layer.coarse.rope_pairs_P
    cos_TP = torch.cat((tokens.cos_TP, still_T1), -1)[:, pairs_P]
    sin_TP = torch.cat((tokens.sin_TP, still_T1 - 1), -1)[:, pairs_P]
    rotated_T1N = rotate_half_split(coarse_k_TN, cos_TP, sin_TP)[:, None]
    store_index_keys(rotated_T1N, layer.coarse.packed_RX, tokens.coarse_rows_T)
    return None if coarse_q_TMN is None else rotate_half_split(coarse_q_TMN, cos_TP[:, None], sin_TP[:, None])


def check_pairs(layer: PagedLayer, tokens: NewTokens) -> None:
    """Raise ConfigError for angles of more rotary pairs than a head has."""
    if 2 * (pairs := tokens.cos_TP.shape[1]) > layer.shapes["q"][1]:
        raise ConfigError(f"cos_TP has P={pairs} pairs; a head has {layer.shapes['q'][1]} dims")


def _check_heads(layer: PagedLayer, tokens: NewTokens, heads: dict[str, Tensor | None]) -> None:
    """Raise ConfigError unless all have the layer's shapes, dtype and device; None is skipped.

    A few comparisons instead of the usual checks, which take longer than a token does.
    """
    check_pairs(layer, tokens)
    require_coarse(layer, tokens.coarse_rows_T, "coarse_rows_T")
    count, like = tokens.count, layer.kv_RGC
    for name, x in heads.items():
        if x is None:
            continue
        expected = (count, *layer.shapes[name])
        if x.shape != expected or x.dtype != like.dtype or x.device != like.device:
            raise ConfigError(
                f"{name} has shape {tuple(x.shape)}, dtype {x.dtype}, device {x.device}; it must have "
                f"{expected}, {like.dtype}, {like.device}"
            )


def require_coarse(layer: PagedLayer, given: Tensor | None, name: str) -> None:
    """Raise ConfigError unless what a layer's coarse level needs is given, and is not where it has none."""
    if (layer.coarse is None) != (given is None):
        there = "none" if layer.coarse is None else "one"
        raise ConfigError(
            f"{name} is {'missing' if given is None else 'given'}; the layer has {there} coarse level"
        )


def _head_rows(heads: tuple[Tensor | None, ...]) -> tuple[Any, list[Tensor | None]]:
    """`Heads` of `cpp/src/paged.h`, one after the other, and what must live as long; None becomes null."""
    held = [None if x is None else _side_by_side(x) for x in heads]
    rows = [HeadsStruct() if x is None else HeadsStruct(x.data_ptr(), x.stride(0)) for x in held]
    return (HeadsStruct * len(rows))(*rows), held


def _side_by_side(x_TN: Tensor) -> Tensor:
    """Heads next to each other, as kernels want them; weights may lie anywhere."""
    return x_TN if x_TN.ndim == 2 or x_TN.stride()[1:] == (x_TN.shape[2], 1) else x_TN.contiguous()


def check_fields(fields: Any, **dtypes: torch.dtype) -> None:
    """Raise ConfigError unless a dataclass's tensors, None aside, have the axes and these dtypes."""
    given = {name: getattr(fields, name) for name in fields.__dataclass_fields__}
    tensors = {name: x for name, x in given.items() if x is not None}
    check_axes(**tensors)
    check_same_device(**tensors)
    for name, dtype in dtypes.items():
        if name in tensors and tensors[name].dtype != dtype:
            raise ConfigError(f"{name} has dtype {tensors[name].dtype}; it must be {dtype}")
