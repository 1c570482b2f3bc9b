"""Selection by the C++ kernels: the threshold by halving the range of scores, no sorting."""

import torch
from torch import Tensor

from fulmen.ops.cpp.library import call_cpp
from fulmen.ops.dispatch import KERNEL_DTYPES, implements
from fulmen.ops.scores.cpp import call_index_kernel


@implements("select_topk", "cpp", dtypes=KERNEL_DTYPES)
def select_topk_cpp(scores_BTS: Tensor, start_BT: Tensor, stop_BT: Tensor, topk: int) -> Tensor:
    """See `fulmen.ops.topk.select_topk`."""
    batch, queries, n_keys = scores_BTS.shape
    topk_BTK = torch.empty(batch, queries, min(topk, n_keys), dtype=torch.int32)
    scores_BTS = scores_BTS.float().contiguous()
    intervals = (x.long().contiguous() for x in (start_BT, stop_BT))
    sizes = (batch * queries, n_keys, topk_BTK.shape[-1], torch.get_num_threads())
    call_cpp("fulmen_select_topk", scores_BTS, *intervals, topk_BTK, *sizes)
    return topk_BTK


@implements("index_topk", "cpp", dtypes=KERNEL_DTYPES)
def index_topk_cpp(
    q_BTJE: Tensor,
    k_BSIE: Tensor,
    w_BTJ: Tensor,
    b_BTJ: Tensor | None,
    start_BT: Tensor,
    stop_BT: Tensor,
    topk: int,
    dense_up_to: int = 0,
) -> Tensor:
    """See `fulmen.ops.topk.index_topk`; queries that see no more than `dense_up_to` keys keep them all.

    Nothing is scored for queries that keep all they see. K = min(S, max(topk, dense_up_to)).
    """
    n_keys = k_BSIE.shape[1]
    n_columns = min(max(topk, dense_up_to), n_keys)
    topk_BTK = torch.empty(*q_BTJE.shape[:2], n_columns, dtype=torch.int32)
    inputs = (q_BTJE, k_BSIE, w_BTJ, b_BTJ, start_BT, stop_BT)
    call_index_kernel("fulmen_index_topk", *inputs, topk_BTK, min(topk, n_keys), n_columns, None)
    return topk_BTK
