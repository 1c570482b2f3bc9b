"""Selection in two levels by the C++ kernel."""

import torch
from torch import Tensor

from fulmen.ops.cpp.abi import CoarseLevelStruct
from fulmen.ops.cpp.library import row_major
from fulmen.ops.dispatch import KERNEL_DTYPES, implements
from fulmen.ops.scores.cpp import call_index_kernel


@implements("two_level_topk", "cpp", dtypes=KERNEL_DTYPES)
def two_level_topk_cpp(
    coarse_q_BTMN: Tensor,
    packed_BSX: Tensor,
    coarse_b_BTM: Tensor,
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
    """See `fulmen.ops.two_level.two_level_topk`; the coarse keys are packed."""
    n_columns = min(topk, k_BSIE.shape[1])
    topk_BTK = torch.empty(*q_BTJE.shape[:2], n_columns, dtype=torch.int32)
    q_BTMN, b_BTM = (x.float().contiguous() for x in (coarse_q_BTMN, coarse_b_BTM))
    packed_BSX = row_major(packed_BSX)
    coarse = CoarseLevelStruct(
        *(*q_BTMN.shape[2:], n_candidates, all_up_to, *packed_BSX.stride()[:2]),
        *(q_BTMN.data_ptr(), b_BTM.data_ptr(), packed_BSX.data_ptr(), None),
    )
    inputs = (q_BTJE, k_BSIE, w_BTJ, b_BTJ, start_BT, stop_BT)
    call_index_kernel("fulmen_index_topk", *inputs, topk_BTK, n_columns, n_columns, coarse)
    return topk_BTK
