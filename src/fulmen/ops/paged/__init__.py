"""Selection and attention straight from a paged cache, for serving; no gradient.

A cache is a list of rows, each with what is kept of one token; `rows_BS` (int32) says in which row key s of
batch row b lies. What comes out is that of `index_topk`, `sparse_attention` and `dense_attention` on the
gathered rows; the native kernels read them where they are.
"""

import torch
from torch import Tensor

from fulmen.ops.checks import check_attention_inputs, check_axes, check_floating, check_integer
from fulmen.ops.dispatch import resolve
from fulmen.ops.index_keys import pack_index_keys
from fulmen.ops.paged.native import (
    paged_attention_native,
    paged_index_topk_native,
    store_index_keys_native,
)
from fulmen.ops.paged.reference import paged_attention_reference, paged_index_topk_reference


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
    check_integer(packed_RX=packed_RX, rows_T=rows_T)
    if resolve("store_index_keys", k_TIE.device, k_TIE.dtype) == "native":
        store_index_keys_native(k_TIE, packed_RX, rows_T)
    else:
        packed_RX[rows_T] = pack_index_keys(k_TIE).flatten(1)


@torch.no_grad()
def paged_index_topk(
    q_BTJE: Tensor,
    packed_RX: Tensor,
    rows_BS: Tensor,
    w_BTJ: Tensor,
    b_BTJ: Tensor | None,
    stop_BT: Tensor,
    topk: int,
    whole: int,
) -> Tensor:
    """Which of its keys 0 <= s < stop each query keeps: all up to `whole` of them, else the `topk` best.

    Args:
        q_BTJE, w_BTJ, b_BTJ: as `fulmen.ops.index_scores.index_scores`.
        packed_RX: int8, rows contiguous: the packed index keys (`fulmen.ops.index_keys`) of all index key
        heads.
        rows_BS: int32, below R wherever s < stop.
        stop_BT: integers, at most S.

    Returns:
        topk_BTK, int32: positions s, ascending, then -1; K = min(S, max(topk, whole)).

    Raises:
        ConfigError: axes or dtypes that do not fit together.
        BackendError: a pinned backend that cannot run here.
    """
    check_axes(q_BTJE=q_BTJE, rows_BS=rows_BS, w_BTJ=w_BTJ, b_BTJ=b_BTJ, stop_BT=stop_BT)
    check_floating(q_BTJE=q_BTJE, w_BTJ=w_BTJ, b_BTJ=b_BTJ)
    check_integer(packed_RX=packed_RX, rows_BS=rows_BS, stop_BT=stop_BT)
    arguments = (q_BTJE, packed_RX, rows_BS, w_BTJ, b_BTJ, stop_BT, topk, whole)
    if resolve("paged_index_topk", q_BTJE.device, q_BTJE.dtype) == "native":
        return paged_index_topk_native(*arguments)
    return paged_index_topk_reference(*arguments)


@torch.no_grad()
def paged_attention(
    q_BTHD: Tensor,
    k_RGD: Tensor,
    v_RGV: Tensor,
    rows_BS: Tensor,
    stop_BT: Tensor,
    topk_BTK: Tensor | None,
    scale: float,
) -> Tensor:
    """out_BTHV, attention over the selected keys, or (with `topk_BTK` None) over all keys 0 <= s < stop.

    Args:
        q_BTHD, k_RGD, v_RGV: one floating dtype.
        rows_BS, stop_BT: as `paged_index_topk`.
        topk_BTK: positions s, negative for nothing.

    Raises: as `paged_index_topk`.
    """
    check_attention_inputs(
        {"q_BTHD": q_BTHD, "k_RGD": k_RGD, "v_RGV": v_RGV}, rows_BS=rows_BS, stop_BT=stop_BT
    )
    arguments = (q_BTHD, k_RGD, v_RGV, rows_BS, stop_BT, topk_BTK, scale)
    if resolve("paged_attention", q_BTHD.device, q_BTHD.dtype) == "native":
        return paged_attention_native(*arguments)
    return paged_attention_reference(*arguments)
