"""Selection and attention from a paged cache, for serving; no gradient.

A cache is a list of rows, each with what is kept of one token; `rows_BS` (int32) says in which row key s of
batch row b lies. What comes out is that of `index_topk`, `sparse_attention` and `dense_attention` on the
gathered rows. Index keys are small and are gathered; keys and values are read where they lie when each
sequence has one query, and gathered where many queries share them.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fulmen.errors import ConfigError
from fulmen.ops.attention.dense import dense_attention
from fulmen.ops.attention.sparse import sparse_attention
from fulmen.ops.common.checks import check_attention_inputs, check_axes, check_floating, check_integer
from fulmen.ops.common.index_keys import SCALE_BYTES, is_packed, pack_index_keys
from fulmen.ops.cpp.library import call_cpp
from fulmen.ops.dispatch import KERNEL_DTYPES, implementation, implements
from fulmen.ops.topk import index_topk
from fulmen.ops.topk.cpp import index_topk_cpp


@torch.no_grad()
def store_index_keys(k_TIE: Tensor, packed_RX: Tensor, rows_T: Tensor) -> None:
    """Pack the index keys of T tokens into their rows of a cache, as `pack_index_keys` does.

    Args:
        packed_RX: int8, rows contiguous, X = I * (E + 2); written in place.
        rows_T: int64, below R.

    Raises: as `paged_index_topk`.
    """
    check_axes(k_TIE=k_TIE, packed_RX=packed_RX, rows_T=rows_T)
    check_floating(k_TIE=k_TIE)
    _check_packed(packed_RX)
    check_integer(rows_T=rows_T)
    implementation("store_index_keys", k_TIE.device, k_TIE.dtype).run(k_TIE, packed_RX, rows_T)


@implements("store_index_keys", "reference", "torch")
def store_index_keys_composed(k_TIE: Tensor, packed_RX: Tensor, rows_T: Tensor) -> None:
    """The specification, on any device."""
    packed_RX[rows_T.long()] = pack_index_keys(k_TIE).flatten(1)


@implements("store_index_keys", "cpp", dtypes=KERNEL_DTYPES)
def store_index_keys_cpp(k_TIE: Tensor, packed_RX: Tensor, rows_T: Tensor) -> None:
    """By the C++ kernel."""
    sizes = (*k_TIE.shape, packed_RX.stride(0))
    keys = k_TIE.float().contiguous()
    call_cpp("fulmen_store_index_keys", keys, rows_T.long().contiguous(), packed_RX, *sizes)


class PagedCoarse(NamedTuple):
    """The first of two levels: queries and shifts, the cache of packed keys, its rows, how many it leaves,
    and of how many visible keys it leaves all.
    """

    q_BTMN: Tensor
    b_BTM: Tensor
    packed_RX: Tensor
    rows_BS: Tensor
    n_candidates: int
    all_up_to: int


@torch.no_grad()
def paged_index_topk(
    q_BTJE: Tensor,
    packed_RX: Tensor,
    rows_BS: Tensor,
    w_BTJ: Tensor,
    b_BTJ: Tensor | None,
    stop_BT: Tensor,
    topk: int,
    dense_up_to: int,
    coarse: PagedCoarse | None = None,
) -> Tensor:
    """Which of its keys 0 <= s < stop a query keeps: all, up to `dense_up_to` of them, else the `topk` best.

    Args:
        q_BTJE, w_BTJ, b_BTJ: as `fulmen.ops.scores.index_scores`.
        packed_RX: int8, rows contiguous: packed index keys (`fulmen.ops.common.index_keys`), all heads of a
        token. rows_BS: int32, a row of the cache for every s < S.
        stop_BT: integers, at most S.
        coarse: what leaves some of the keys to the indexer; None: it scores all.

    Returns:
        topk_BTK, int32: positions s, ascending, then -1; K = min(S, max(topk, dense_up_to)).

    Raises:
        ConfigError: axes or dtypes that do not fit together.
        BackendError: a pinned backend that cannot run here.
    """
    check_axes(q_BTJE=q_BTJE, rows_BS=rows_BS, w_BTJ=w_BTJ, b_BTJ=b_BTJ, stop_BT=stop_BT)
    check_floating(q_BTJE=q_BTJE, w_BTJ=w_BTJ, b_BTJ=b_BTJ)
    _check_packed(packed_RX)
    check_integer(rows_BS=rows_BS, stop_BT=stop_BT)
    packed_BSIX = _gather(packed_RX, rows_BS).unflatten(-1, (-1, q_BTJE.shape[-1] + SCALE_BYTES))
    inputs = (q_BTJE, packed_BSIX, w_BTJ, b_BTJ, torch.zeros_like(stop_BT), stop_BT)
    if coarse is None:
        return implementation("paged_index_topk", q_BTJE.device, q_BTJE.dtype).run(*inputs, topk, dense_up_to)
    coarse_k_BSX = _gather(coarse.packed_RX, coarse.rows_BS)
    best_BTK = implementation("two_level_topk", q_BTJE.device, q_BTJE.dtype).run(
        coarse.q_BTMN, coarse_k_BSX, coarse.b_BTM, *inputs, topk, coarse.n_candidates, coarse.all_up_to
    )
    return keep_all_of_few(best_BTK, stop_BT, packed_BSIX.shape[1], dense_up_to)


@implements("paged_index_topk", "reference", "torch", "triton")
def index_topk_composed(
    q_BTJE: Tensor,
    packed_BSIX: Tensor,
    w_BTJ: Tensor,
    b_BTJ: Tensor | None,
    start_BT: Tensor,
    stop_BT: Tensor,
    topk: int,
    dense_up_to: int,
) -> Tensor:
    """Selection by `index_topk`, and all keys of queries that see few, one after the other."""
    best_BTK = index_topk(q_BTJE, packed_BSIX, w_BTJ, b_BTJ, start_BT, stop_BT, topk)
    return keep_all_of_few(best_BTK, stop_BT, packed_BSIX.shape[1], dense_up_to)


def keep_all_of_few(best_BTK: Tensor, stop_BT: Tensor, n_keys: int, dense_up_to: int) -> Tensor:
    """A selection in which queries that see at most `dense_up_to` keys keep all of them."""
    n_columns = min(n_keys, max(best_BTK.shape[-1], dense_up_to))
    chosen_BTK = torch.nn.functional.pad(best_BTK, (0, n_columns - best_BTK.shape[-1]), value=-1)
    position_K = torch.arange(n_columns, dtype=torch.int32, device=best_BTK.device)
    all_BTK = torch.where(position_K < stop_BT[..., None], position_K, -1)
    return torch.where(stop_BT[..., None] <= dense_up_to, all_BTK, chosen_BTK)


implements("paged_index_topk", "cpp", dtypes=KERNEL_DTYPES)(index_topk_cpp)


@torch.no_grad()
def paged_attention(
    q_BTHD: Tensor,
    kv_RGC: Tensor,
    rows_BS: Tensor,
    stop_BT: Tensor,
    topk_BTK: Tensor | None,
    scale: float,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """out_BTHV, attention over the selected keys, or (with `topk_BTK` None) over all keys 0 <= s < stop.

    Args:
        q_BTHD, kv_RGC: one floating dtype; C = D + V, a head's key, then its value.
        rows_BS, stop_BT: as `paged_index_topk`.
        topk_BTK: positions s, negative for nothing.
        scale, softcap, sinks_H: as `fulmen.ops.attention.sparse.sparse_attention`.

    Raises: as `paged_index_topk`.
    """
    check_attention_inputs({"q_BTHD": q_BTHD, "kv_RGC": kv_RGC}, rows_BS=rows_BS, stop_BT=stop_BT)
    width, softmax = q_BTHD.shape[-1], (scale, softcap, sinks_H)
    if kv_RGC.shape[-1] <= width:
        raise ConfigError(f"kv_RGC has C={kv_RGC.shape[-1]}; keys and values need more than D={width}")
    if q_BTHD.shape[1] == 1 and q_BTHD.device.type == "cpu":
        kv_BRGC = kv_RGC[None].expand(len(q_BTHD), -1, -1, -1)
        k_BRGD, v_BRGV = kv_BRGC[..., :width], kv_BRGC[..., width:]
        return sparse_attention(q_BTHD, k_BRGD, v_BRGV, _rows_read(rows_BS, stop_BT, topk_BTK), *softmax)[0]
    kv_BSGC = _gather(kv_RGC, rows_BS)
    k_BSGD, v_BSGV = kv_BSGC[..., :width], kv_BSGC[..., width:]
    if topk_BTK is not None:
        return sparse_attention(q_BTHD, k_BSGD, v_BSGV, topk_BTK, *softmax)[0]
    return dense_attention(q_BTHD, k_BSGD, v_BSGV, torch.zeros_like(stop_BT), stop_BT, *softmax)[0]


def _rows_read(rows_BS: Tensor, stop_B1: Tensor, topk_B1K: Tensor | None) -> Tensor:
    """`[B, 1, K]`: the rows of the cache that one query of each sequence reads, -1 for none."""
    if topk_B1K is None:
        position_S = torch.arange(rows_BS.shape[1], device=rows_BS.device)
        return torch.where(position_S < stop_B1, rows_BS, -1)[:, None]
    rows_B1K = rows_BS[:, None].gather(-1, topk_B1K.clamp(min=0).long())
    return torch.where(topk_B1K < 0, -1, rows_B1K)


def _gather(x_RX: Tensor, rows_BS: Tensor) -> Tensor:
    return x_RX.index_select(0, rows_BS.flatten()).unflatten(0, tuple(rows_BS.shape))


def _check_packed(packed_RX: Tensor) -> None:
    if not is_packed(packed_RX):
        raise ConfigError(f"packed_RX has dtype {packed_RX.dtype}; pack index keys by pack_index_keys")
