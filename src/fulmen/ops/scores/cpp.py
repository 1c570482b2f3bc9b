"""Index scores by the C++ kernel: the same bits for a query and a key whatever else is computed."""

from typing import Any

import torch
from torch import Tensor

from fulmen.ops.common.index_keys import is_packed
from fulmen.ops.cpp.abi import IndexShape
from fulmen.ops.cpp.library import call_cpp, has_tiles, kernel_floats, row_major
from fulmen.ops.dispatch import KERNEL_DTYPES, implements

# `KeyKind` of `cpp/src/index_inputs.h`
KEY_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}


@implements("index_scores", "cpp", dtypes=KERNEL_DTYPES)
def index_scores_cpp(
    q_BTJE: Tensor,
    k_BSIE: Tensor,
    w_BTJ: Tensor,
    b_BTJ: Tensor | None,
    start_BT: Tensor,
    stop_BT: Tensor,
) -> Tensor:
    """See `fulmen.ops.scores.index_scores`."""
    scores_BTS = torch.full((*q_BTJE.shape[:2], k_BSIE.shape[1]), -torch.inf)
    inputs = (q_BTJE, k_BSIE, w_BTJ, b_BTJ, start_BT, stop_BT)
    call_index_kernel("fulmen_index_scores", *inputs, scores_BTS, 0, 0)
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
    columns: int,
    *more: Any,
) -> None:
    """Fill `result` by one of the kernels that take an indexer's inputs; a selection has `columns`."""
    batch, queries, heads, width = q_BTJE.shape
    k_BSIE = row_major(k_BSIE) if is_packed(k_BSIE) else kernel_floats(k_BSIE)
    shape = IndexShape(
        *(batch, queries, k_BSIE.shape[1], heads, k_BSIE.shape[2], width, topk, columns),
        *(KEY_KINDS[k_BSIE.dtype], *k_BSIE.stride()[:3], torch.get_num_threads(), has_tiles()),
    )
    q_BTJE = q_BTJE.float().contiguous()
    shift_BTJ = None if b_BTJ is None else b_BTJ.float().contiguous()
    intervals = (x.long().contiguous() for x in (start_BT, stop_BT))
    call_cpp(
        function, q_BTJE, k_BSIE, w_BTJ.float().contiguous(), shift_BTJ, *intervals, result, shape, *more
    )
