"""The rows are gathered, then the operations on plain keys do the work, by whatever backend they have."""

import torch
from torch import Tensor

from fulmen.ops.dense_attention import dense_attention
from fulmen.ops.index_keys import SCALE_BYTES, unpack_index_keys
from fulmen.ops.precision import math_dtype
from fulmen.ops.select_topk import index_topk
from fulmen.ops.sparse_attention import sparse_attention


def paged_index_topk_reference(
    q_BTJE: Tensor,
    packed_RX: Tensor,
    rows_BS: Tensor,
    w_BTJ: Tensor,
    b_BTJ: Tensor | None,
    stop_BT: Tensor,
    topk: int,
    whole: int,
) -> Tensor:
    """See `fulmen.ops.paged.paged_index_topk`."""
    head_bytes = q_BTJE.shape[-1] + SCALE_BYTES
    packed_BSIX = packed_RX[rows_BS.long()].unflatten(-1, (-1, head_bytes))
    dtype = math_dtype(q_BTJE.dtype)
    k_BSIE = unpack_index_keys(packed_BSIX, dtype)
    n_columns = min(rows_BS.shape[1], max(topk, whole))
    chosen_BTK = torch.full((*stop_BT.shape, n_columns), -1, dtype=torch.int32, device=q_BTJE.device)
    best_BTK = index_topk(q_BTJE.to(dtype), k_BSIE, w_BTJ, b_BTJ, torch.zeros_like(stop_BT), stop_BT, topk)
    chosen_BTK[..., : best_BTK.shape[-1]] = best_BTK
    position_K = torch.arange(n_columns, dtype=torch.int32, device=q_BTJE.device)
    all_BTK = torch.where(position_K < stop_BT[..., None], position_K, -1)
    return torch.where(stop_BT[..., None] <= whole, all_BTK, chosen_BTK)


def paged_attention_reference(
    q_BTHD: Tensor,
    k_RGD: Tensor,
    v_RGV: Tensor,
    rows_BS: Tensor,
    stop_BT: Tensor,
    topk_BTK: Tensor | None,
    scale: float,
) -> Tensor:
    """See `fulmen.ops.paged.paged_attention`."""
    k_BSGD, v_BSGV = k_RGD[rows_BS.long()], v_RGV[rows_BS.long()]
    if topk_BTK is not None:
        return sparse_attention(q_BTHD, k_BSGD, v_BSGV, topk_BTK, scale)[0]
    return dense_attention(q_BTHD, k_BSGD, v_BSGV, torch.zeros_like(stop_BT), stop_BT, scale)[0]
