"""Index scores by the native kernel: the same bits for a query and a key whatever else is computed."""

import torch
from torch import Tensor

from fulmen.ops.native_library import IndexShape, call_native, kernel_floats


def index_scores_native(
    q_BTJE: Tensor,
    k_BSIE: Tensor,
    w_BTJ: Tensor,
    b_BTJ: Tensor | None,
    start_BT: Tensor,
    stop_BT: Tensor,
) -> Tensor:
    """See `fulmen.ops.index_scores.index_scores`."""
    scores_BTS = torch.full((*q_BTJE.shape[:2], k_BSIE.shape[1]), -torch.inf)
    call_index_kernel("fulmen_index_scores", q_BTJE, k_BSIE, w_BTJ, b_BTJ, start_BT, stop_BT, scores_BTS, 0)
    return scores_BTS


def call_index_kernel(
    function: str,
    q_BTJE: Tensor,
    k_BSIE: Tensor,
    w_BTJ: Tensor,
    b_BTJ: Tensor | None,
    start_BT: Tensor,
    stop_BT: Tensor,
    result: Tensor,
    topk: int,
) -> None:
    """Fill `result` by one of the kernels that take an indexer's inputs."""
    batch, queries, heads, width = q_BTJE.shape
    k_BSIE = kernel_floats(k_BSIE)
    shape = IndexShape(
        *(batch, queries, k_BSIE.shape[1], heads, k_BSIE.shape[2], width, topk),
        *(k_BSIE.dtype == torch.bfloat16, *k_BSIE.stride()[:3], torch.get_num_threads()),
    )
    q_BTJE = (q_BTJE.float() * width**-0.5).contiguous()
    shift_BTJ = None if b_BTJ is None else b_BTJ.float().contiguous()
    intervals = (x.long().contiguous() for x in (start_BT, stop_BT))
    call_native(function, q_BTJE, k_BSIE, w_BTJ.float().contiguous(), shift_BTJ, *intervals, result, shape)
