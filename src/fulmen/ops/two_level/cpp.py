"""Selection in two levels by the C++ kernel."""

import torch
from torch import Tensor

from fulmen.ops.common.index_keys import SCALE_BYTES
from fulmen.ops.cpp.abi import CoarseLevelStruct
from fulmen.ops.cpp.library import row_major
from fulmen.ops.dispatch import KERNEL_DTYPES, implements
from fulmen.ops.scores.cpp import call_index_kernel


@implements("two_level_topk", "cpp", dtypes=KERNEL_DTYPES)
def two_level_topk_cpp(
    packed_q_BTX: Tensor,
    packed_k_BSX: Tensor,
    q_BTJE: Tensor,
    k_BSIE: Tensor,
    w_BTJ: Tensor,
    b_BTJ: Tensor | None,
    start_BT: Tensor,
    stop_BT: Tensor,
    topk: int,
    n_candidates: int,
    all_up_to: int,
) -> Tensor:
    """See `fulmen.ops.two_level.two_level_topk`; the coarse queries and keys are packed."""
    n_columns = min(topk, k_BSIE.shape[1])
    topk_BTK = torch.empty(*q_BTJE.shape[:2], n_columns, dtype=torch.int32)
    packed_q_BTX, packed_k_BSX = packed_q_BTX.contiguous(), row_major(packed_k_BSX)
    coarse = CoarseLevelStruct(
        *(packed_q_BTX.shape[-1] - SCALE_BYTES, n_candidates, all_up_to, *packed_k_BSX.stride()[:2]),
        *(packed_q_BTX.data_ptr(), packed_k_BSX.data_ptr(), None),
    )
    inputs = (q_BTJE, k_BSIE, w_BTJ, b_BTJ, start_BT, stop_BT)
    call_index_kernel("fulmen_index_topk", *inputs, topk_BTK, n_columns, n_columns, coarse)
    return topk_BTK
