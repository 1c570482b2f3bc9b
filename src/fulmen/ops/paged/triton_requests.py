"""A step's attention on a GPU: scores, selection and attention over paged caches, each by its kernels."""

import torch
import triton
from torch import Tensor

from fulmen.errors import BackendError
from fulmen.ops.paged.layer import PagedLayer
from fulmen.ops.paged.project import NewIndexQueries
from fulmen.ops.paged.requests import Requests, reason_against_shape
from fulmen.ops.paged.triton_attend import FEW_QUERIES, launch_paged_attend, part_bytes
from fulmen.ops.paged.triton_dense import launch_paged_dense
from fulmen.ops.paged.triton_scores import launch_paged_scores
from fulmen.ops.paged.triton_select import candidate_bytes, launch_paged_select

# Scores that are held at a time: 256 MB.
HELD_PAGED_SCORES = 2**26


def attend_requests_triton(
    layer: PagedLayer, requests: Requests, q_THD: Tensor, index: NewIndexQueries | None, out_THD: Tensor
) -> None:
    """See `fulmen.ops.paged.requests.attend_requests`."""
    if reason := reason_against_shape(q_THD.shape[2], layer.topk, layer.coarse is not None):
        raise BackendError(f"backend 'triton' cannot run attend_requests: {reason}; pin 'torch'")
    if not len(q_THD):
        return
    q_THD = q_THD.contiguous()
    selects = index is not None and requests.most_keys > max(layer.topk, layer.dense_up_to)
    chosen_TK = select_keys(layer, requests, index) if index is not None and selects else None
    if requests.most_queries > FEW_QUERIES:
        launch_paged_dense(layer, requests, q_THD, out_THD)
    launch_paged_attend(layer, requests, q_THD, chosen_TK, out_THD)


def select_keys(layer: PagedLayer, requests: Requests, index: NewIndexQueries) -> Tensor:
    """chosen_TK, int32: the `layer.topk` best keys of each query that does not keep all, ascending.

    What stands in the rows of other queries is not defined.
    """
    count, more_than = len(index.q_TJE), max(layer.topk, layer.dense_up_to)
    chosen_TK = torch.empty(count, layer.topk, dtype=torch.int32, device=index.q_TJE.device)
    q_TJE, w_TJ, b_TJ = (x.contiguous() for x in (index.q_TJE, index.w_TJ, index.b_TJ))
    at_once = min(max(HELD_PAGED_SCORES // requests.most_keys, 1), count)
    # Rows as Triton likes them: it would compile a kernel for others, too.
    width = triton.cdiv(requests.most_keys, 16) * 16
    scores_TS = torch.empty(at_once, width, dtype=torch.float32, device=chosen_TK.device)
    for low in range(0, count, at_once):
        tokens = slice(low, min(low + at_once, count))
        caches = (layer.packed_RX, requests, requests.index_rows_per_block)
        launch_paged_scores(q_TJE, w_TJ, b_TJ, *caches, tokens, more_than, scores_TS)
        launch_paged_select(scores_TS, requests, tokens, more_than, layer.topk, chosen_TK)
    return chosen_TK


def reserve_workspace_triton(
    out_THD: Tensor, topk: int, all_up_to: int, most_keys: int, most_requests: int
) -> None:
    """See `fulmen.ops.paged.requests.reserve_workspace`."""
    at_once = min(max(HELD_PAGED_SCORES // most_keys, 1), len(out_THD))
    selection = at_once * (4 * most_keys + candidate_bytes(most_keys, topk))
    most = max(selection, part_bytes(out_THD[: FEW_QUERIES * most_requests], all_up_to))
    torch.empty(most, dtype=torch.uint8, device=out_THD.device)
