"""A step's attention on a GPU: scores, selection and attention over paged caches, each by its kernels."""

import torch
import triton
from torch import Tensor

from fulmen.errors import BackendError
from fulmen.ops.paged.layer import CoarseCache, PagedLayer
from fulmen.ops.paged.project import NewIndexQueries
from fulmen.ops.paged.requests import Requests, StepBounds, reason_against_shape
from fulmen.ops.paged.triton_attend import FEW_QUERIES, launch_paged_attend, part_bytes
from fulmen.ops.paged.triton_blocks import Queries
from fulmen.ops.paged.triton_candidates import choice_bytes, choose_candidates
from fulmen.ops.paged.triton_dense import launch_paged_dense
from fulmen.ops.paged.triton_scores import PagedIndex, launch_paged_fine, launch_paged_scores
from fulmen.ops.paged.triton_select import Candidates, candidate_bytes, launch_paged_select

# Scores that are held at a time: 256 MB.
HELD_PAGED_SCORES = 2**26


def attend_requests_triton(
    layer: PagedLayer, requests: Requests, q_THD: Tensor, index: NewIndexQueries | None, out_THD: Tensor
) -> None:
    """See `fulmen.ops.paged.requests.attend_requests`."""
    if reason := reason_against_shape(q_THD.shape[2], layer.topk):
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
    fine = PagedIndex(q_TJE, w_TJ, b_TJ, layer.packed_RX, requests.index_rows_per_block)
    coarse = coarse_index(layer, requests, index) if layer.asks_coarse(requests.most_keys) else None
    at_once = min(max(HELD_PAGED_SCORES // requests.most_keys, 1), count)
    for low in range(0, count, at_once):
        tokens = slice(low, min(low + at_once, count))
        queries = Queries(requests, tokens, more_than, requests.most_keys)
        if layer.coarse is None or coarse is None:
            select_among_all(fine, queries, chosen_TK[tokens])
        else:
            select_in_two_levels(layer.coarse, coarse, fine, queries, chosen_TK[tokens])
    return chosen_TK


def select_among_all(index: PagedIndex, queries: Queries, chosen_TK: Tensor) -> None:
    """As `launch_paged_select`, by the scores of all keys."""
    scores_TS = scores_for(queries, queries.most_keys)
    launch_paged_scores(index, queries, scores_TS)
    launch_paged_select(scores_TS, queries, chosen_TK.shape[1], chosen_TK)


def coarse_index(layer: PagedLayer, requests: Requests, index: NewIndexQueries) -> PagedIndex:
    """The first level as an indexer: its heads have weights of 1, and what is no number comes first."""
    assert layer.coarse is not None
    assert index.coarse_q_TMN is not None
    assert index.coarse_b_TM is not None
    queries = (index.coarse_q_TMN.contiguous(), None, index.coarse_b_TM.contiguous())
    cache = (layer.coarse.packed_RX, requests.coarse_rows_per_block)
    return PagedIndex(*queries, *cache, for_nan=torch.inf, sizes="paged_coarse")


def select_in_two_levels(
    level: CoarseCache, coarse: PagedIndex, fine: PagedIndex, queries: Queries, chosen_TK: Tensor
) -> None:
    """As `launch_paged_select`, among candidates where a query sees so many keys that these are chosen."""
    n_candidates, coarse_from, _ = level.numbers
    far = queries._replace(more_than=max(queries.more_than, coarse_from))
    near = queries._replace(at_most=coarse_from)
    candidates_TC = torch.empty(queries.n_tokens, n_candidates, dtype=torch.int32, device=chosen_TK.device)
    coarse_TS = scores_for(queries, queries.most_keys)
    launch_paged_scores(coarse, far, coarse_TS)
    choose_candidates(coarse_TS, far, candidates_TC)
    fine_TS = scores_for(queries, near.most_keys)
    if near.more_than < near.at_most:
        launch_paged_scores(fine, near, fine_TS)
    launch_paged_fine(fine, far, candidates_TC, fine_TS)
    candidates = Candidates(candidates_TC, coarse_from)
    launch_paged_select(fine_TS, queries, chosen_TK.shape[1], chosen_TK, candidates)


def scores_for(queries: Queries, most: int) -> Tensor:
    """float32, for the scores of `most` keys of each query, or somewhat more."""
    # Rows as Triton likes them: it would compile a kernel for others, too.
    width, device = triton.cdiv(most, 16) * 16, queries.requests.length_B.device
    return torch.empty(queries.n_tokens, width, dtype=torch.float32, device=device)


def reserve_workspace_triton(out_THD: Tensor, bounds: StepBounds) -> None:
    """See `fulmen.ops.paged.requests.reserve_workspace`."""
    at_once = min(max(HELD_PAGED_SCORES // bounds.most_keys, 1), len(out_THD))
    parts = part_bytes(out_THD[: FEW_QUERIES * bounds.most_requests], bounds.all_up_to)
    most = max(at_once * selection_bytes(bounds), parts)
    torch.empty(most, dtype=torch.uint8, device=out_THD.device)


def selection_bytes(bounds: StepBounds) -> int:
    """Of a query: scores, candidates, and what selections hand on, as if all were held at the same time."""
    if not bounds.asks_coarse:
        return 4 * bounds.most_keys + candidate_bytes(bounds.most_keys, bounds.topk)
    coarse = 4 * bounds.most_keys + choice_bytes(bounds.most_keys, bounds.n_candidates)
    fine = 4 * bounds.coarse_from + candidate_bytes(bounds.coarse_from, bounds.topk)
    return coarse + 4 * bounds.n_candidates + fine
