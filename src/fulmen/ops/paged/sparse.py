"""Queries over paged caches: what each keeps is chosen, then attended to; no gradient.

The same as `paged_index_topk` and `paged_attention`, in one call: what lies between is no tensor.
"""

import ctypes
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fulmen.errors import ConfigError
from fulmen.ops.cpp.abi import KeyRowsStruct, PagedQueriesStruct
from fulmen.ops.cpp.library import call_cpp_by_numbers
from fulmen.ops.dispatch import CACHE_DTYPES, implementation, implements
from fulmen.ops.paged import PagedCoarse, paged_attention, paged_index_topk
from fulmen.ops.paged.layer import PagedLayer, check_fields, require_coarse


@dataclass(frozen=True, eq=False)
class KeyRows:
    """Where the keys of each sequence lie, for all layers whose caches are cut alike.

    Attributes:
        rows_BS, index_rows_BS: int32, the rows of both caches in which key s lies (below R).
        stop_BT: int64, keys that each query sees, its own token's the last: 1 to S.
        coarse_rows_BS: int32, the same rows of the cache of coarse keys, of an index in two levels.

    Raises ConfigError: axes or dtypes that do not fit together.
    """

    rows_BS: Tensor
    index_rows_BS: Tensor
    stop_BT: Tensor
    coarse_rows_BS: Tensor | None = None

    def __post_init__(self) -> None:
        rows = dict.fromkeys(("rows_BS", "index_rows_BS", "coarse_rows_BS"), torch.int32)
        check_fields(self, **rows, stop_BT=torch.int64)

    @cached_property
    def struct(self) -> KeyRowsStruct:
        """For the kernels; valid as long as this object."""
        return KeyRowsStruct(self.rows_BS.shape[1], *(x if x is None else x.data_ptr() for x in self._held))

    @cached_property
    def _held(self) -> tuple[Tensor | None, ...]:
        all_rows = (self.rows_BS, self.index_rows_BS, self.coarse_rows_BS, self.stop_BT)
        return tuple(x if x is None else x.contiguous() for x in all_rows)


@torch.no_grad()
def paged_sparse_attention(
    layer: PagedLayer,
    q_BTHD: Tensor,
    index_q_BTJE: Tensor,
    w_BTJ: Tensor,
    b_BTJ: Tensor,
    key_rows: KeyRows,
    out_BTHD: Tensor,
    coarse_q_BTMN: Tensor | None = None,
    coarse_b_BTM: Tensor | None = None,
) -> None:
    """Attention of a query over all its keys, up to `layer.dense_up_to`, else over the `layer.topk` best.

    Args:
        q_BTHD, index_q_BTJE, w_BTJ, b_BTJ: queries and index queries, rotated, and the indexer's
            weights and shifts; all of the cache's dtype.
        out_BTHD: contiguous, written.
        coarse_q_BTMN, coarse_b_BTM: coarse queries, rotated, and shifts, of an index in two levels; they may
            be left out where no query sees so many keys that the coarse level is asked.

    Raises:
        ConfigError: axes or dtypes that do not fit together.
        BackendError: a pinned backend that cannot run here.
    """
    floats = {"q_BTHD": q_BTHD, "index_q_BTJE": index_q_BTJE, "w_BTJ": w_BTJ, "b_BTJ": b_BTJ}
    _check_sparse_inputs(layer, floats | {"out_BTHD": out_BTHD}, key_rows)
    _check_coarse_inputs(layer, coarse_q_BTMN, coarse_b_BTM, key_rows)
    require_coarse(layer, key_rows.coarse_rows_BS, "coarse_rows_BS")
    backend = implementation("paged_sparse_attention", *layer.device_and_dtype)
    backend.run(layer, q_BTHD, index_q_BTJE, w_BTJ, b_BTJ, key_rows, out_BTHD, coarse_q_BTMN, coarse_b_BTM)


@implements("paged_sparse_attention", "reference", "torch")
def paged_sparse_attention_composed(
    layer: PagedLayer,
    q_BTHD: Tensor,
    index_q_BTJE: Tensor,
    w_BTJ: Tensor,
    b_BTJ: Tensor,
    key_rows: KeyRows,
    out_BTHD: Tensor,
    coarse_q_BTMN: Tensor | None = None,
    coarse_b_BTM: Tensor | None = None,
) -> None:
    """The specification, on any device."""
    index = (index_q_BTJE, w_BTJ, b_BTJ, key_rows, coarse_q_BTMN, coarse_b_BTM)
    topk_BTK = paged_selection(layer, *index)
    inputs = (layer.kv_RGC, key_rows.rows_BS, key_rows.stop_BT, topk_BTK, *layer.softmax)
    out_BTHD.copy_(paged_attention(q_BTHD, *inputs))


@torch.no_grad()
def paged_selection(
    layer: PagedLayer,
    index_q_BTJE: Tensor,
    w_BTJ: Tensor,
    b_BTJ: Tensor,
    key_rows: KeyRows,
    coarse_q_BTMN: Tensor | None = None,
    coarse_b_BTM: Tensor | None = None,
) -> Tensor:
    """topk_BTK, int32: the keys that `paged_sparse_attention` attends to: positions s, ascending, then -1.

    Args and errors: as there.
    """
    index = (index_q_BTJE, layer.packed_RX, key_rows.index_rows_BS, w_BTJ, b_BTJ, key_rows.stop_BT)
    coarse, rows_BS = None, key_rows.coarse_rows_BS
    if layer.coarse is not None and coarse_q_BTMN is not None:
        assert coarse_b_BTM is not None
        assert rows_BS is not None
        kept = (layer.coarse.packed_RX, rows_BS, *layer.coarse.numbers[:2])
        coarse = PagedCoarse(coarse_q_BTMN, coarse_b_BTM, *kept)
    return paged_index_topk(*index, layer.topk, layer.dense_up_to, coarse)


@implements("paged_sparse_attention", "cpp", dtypes=CACHE_DTYPES)
def paged_sparse_attention_cpp(
    layer: PagedLayer,
    q_BTHD: Tensor,
    index_q_BTJE: Tensor,
    w_BTJ: Tensor,
    b_BTJ: Tensor,
    key_rows: KeyRows,
    out_BTHD: Tensor,
    coarse_q_BTMN: Tensor | None = None,
    coarse_b_BTM: Tensor | None = None,
) -> None:
    """By the C++ kernel."""
    assert out_BTHD.is_contiguous()
    queries_given = (q_BTHD, index_q_BTJE, w_BTJ, b_BTJ, coarse_q_BTMN, coarse_b_BTM)
    held = [x if x is None else x.contiguous() for x in queries_given]
    sizes = (*q_BTHD.shape[:2], torch.get_num_threads())
    queries = PagedQueriesStruct(*sizes, *(x if x is None else x.data_ptr() for x in held))
    structures = map(ctypes.addressof, (layer.struct, queries, key_rows.struct))
    call_cpp_by_numbers("fulmen_paged_sparse", *structures, out_BTHD.data_ptr())


def _check_coarse_inputs(
    layer: PagedLayer, coarse_q_BTMN: Tensor | None, coarse_b_BTM: Tensor | None, key_rows: KeyRows
) -> None:
    """What the coarse level needs, all of it or nothing, in its shapes and of the cache's dtype."""
    if coarse_q_BTMN is None and coarse_b_BTM is None and not layer.asks_coarse(key_rows.rows_BS.shape[1]):
        return
    shapes = {"coarse_q_BTMN": layer.shapes["coarse_q"], "coarse_b_BTM": (layer.coarse_heads,)}
    for (name, numbers), x in zip(shapes.items(), (coarse_q_BTMN, coarse_b_BTM), strict=True):
        require_coarse(layer, x, name)
        if x is not None:
            _require_numbers(name, x, (*key_rows.stop_BT.shape, *numbers), layer.kv_RGC)


def _require_numbers(name: str, x: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    if x.shape != shape or x.dtype is not like.dtype or x.device != like.device:
        raise ConfigError(
            f"{name} has shape {tuple(x.shape)}, {x.dtype}, {x.device}; it must have "
            f"{shape}, {like.dtype}, {like.device}"
        )


def _check_sparse_inputs(layer: PagedLayer, floats: dict[str, Tensor], key_rows: KeyRows) -> None:
    """Little work if all fits, as it is done for every layer."""
    size = key_rows.stop_BT.shape
    per_token = (layer.shapes["q"], layer.shapes["index_q"], *[(layer.n_index_heads,)] * 2, layer.shapes["q"])
    for (name, x), numbers in zip(floats.items(), per_token, strict=True):
        _require_numbers(name, x, (*size, *numbers), layer.kv_RGC)
