"""The native kernels of selection and attention, told where each key's row lies."""

import torch
from torch import Tensor

from fulmen.ops.attention_native import attend_natively
from fulmen.ops.index_scores.native import call_index_kernel, paged_keys
from fulmen.ops.native_library import call_native


def store_index_keys_native(k_TIE: Tensor, packed_RX: Tensor, rows_T: Tensor) -> None:
    """See `fulmen.ops.paged.store_index_keys`."""
    sizes = (*k_TIE.shape, packed_RX.stride(0))
    call_native("fulmen_store_index_keys", k_TIE.float().contiguous(), rows_T.contiguous(), packed_RX, *sizes)


def paged_index_topk_native(
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
    n_keys = rows_BS.shape[1]
    chosen_BTK = torch.empty(*stop_BT.shape, min(n_keys, max(topk, whole)), dtype=torch.int32)
    keys = paged_keys(packed_RX, q_BTJE.shape[-1], rows_BS)
    inputs = (q_BTJE, keys, w_BTJ, b_BTJ, torch.zeros_like(stop_BT), stop_BT)
    call_index_kernel("fulmen_index_topk", *inputs, chosen_BTK, min(topk, n_keys), whole)
    return chosen_BTK


def paged_attention_native(
    q_BTHD: Tensor,
    k_RGD: Tensor,
    v_RGV: Tensor,
    rows_BS: Tensor,
    stop_BT: Tensor,
    topk_BTK: Tensor | None,
    scale: float,
) -> Tensor:
    """See `fulmen.ops.paged.paged_attention`."""
    keys: dict[str, Tensor | None] = {"topk_BTK": topk_BTK}
    if topk_BTK is None:
        keys = {"start_BT": torch.zeros_like(stop_BT), "stop_BT": stop_BT}
    return attend_natively(q_BTHD, k_RGD[None], v_RGV[None], scale, rows_BS=rows_BS, **keys)[0]
