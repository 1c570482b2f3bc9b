"""Selection in two levels: a coarse indexer scores every visible key, the indexer only the best of them."""

from typing import Any

import torch
from torch import Tensor

from fulmen.config import require_positive_int
from fulmen.errors import ConfigError
from fulmen.ops.common.checks import check_axes, check_floating, check_index_inputs, check_same_device
from fulmen.ops.common.index_keys import SCALE_BYTES, is_packed, pack_index_keys
from fulmen.ops.common.opaque import opaque
from fulmen.ops.common.precision import cast_as_autocast, outside_autocast
from fulmen.ops.dispatch import implementation, implements_by_name
from fulmen.ops.two_level.cpp import two_level_topk_cpp
from fulmen.ops.two_level.reference import two_level_topk_reference
from fulmen.ops.two_level.torch_blocked import two_level_topk_blocked

implements_by_name("two_level_topk", "triton", "fulmen.ops.two_level.triton:two_level_topk_triton")


@torch.no_grad()
def two_level_topk(
    coarse_q_BTMN: Tensor,
    coarse_k_BSN: Tensor,
    coarse_b_BTM: Tensor,
    q_BTJE: Tensor,
    k_BSIE: Tensor,
    w_BTJ: Tensor,
    b_BTJ: Tensor | None,
    start_BT: Tensor,
    stop_BT: Tensor,
    topk: int,
    n_candidates: int,
    all_up_to: int = 0,
) -> Tensor:
    """The `topk` keys of the largest index scores among the `n_candidates` keys of the largest coarse scores.

    The coarse score is an index score (`fulmen.ops.scores`) of M heads of weight 1 that read one key head of
    8 bits. Ties go to the more recent key at both levels. A query that sees no more than `topk` keys keeps
    all of them; where all visible keys are candidates, this is `index_topk`. A key whose coarse score is NaN
    is a candidate before all others, so that its index score decides.

    Args:
        coarse_q_BTMN, coarse_b_BTM: coarse queries and shifts, any floating dtype.
        coarse_k_BSN: coarse keys, floating or as a cache keeps them: int8 rows of `pack_index_keys`, of width
            N + 2, any strides but the last.
        q_BTJE, k_BSIE, w_BTJ, b_BTJ, start_BT, stop_BT, topk: as `fulmen.ops.topk.index_topk`.
        n_candidates: at least `topk`.
        all_up_to: of a query that sees no more keys than this, or than `n_candidates`, all are candidates.

    Returns:
        topk_BTK, int32, K = min(topk, S): ascending positions, then -1 where fewer keys are visible.

    Raises:
        ConfigError: topk below 1, fewer candidates; axes, dtypes or devices that do not fit together.
        BackendError: a pinned backend that cannot run here.
    """
    require_positive_int("topk", topk)
    if require_positive_int("n_candidates", n_candidates) < topk:
        raise ConfigError(f"n_candidates={n_candidates} is less than topk={topk}; use a multiple of it")
    q_BTJE, k_BSIE = cast_as_autocast(q_BTJE, k_BSIE)
    if not is_packed(coarse_k_BSN):
        coarse_k_BSN = pack_index_keys(coarse_k_BSN)
    inputs = (q_BTJE, k_BSIE, w_BTJ, b_BTJ, start_BT, stop_BT)
    limits = (topk, n_candidates, max(all_up_to, n_candidates))
    return _select_in_two_levels(coarse_q_BTMN, coarse_k_BSN, coarse_b_BTM, *inputs, *limits)


def _fake_two_level(
    coarse_q_BTMN: Tensor, coarse_k_BSX: Tensor, coarse_b_BTM: Tensor, q_BTJE: Tensor, *more: Any
) -> Tensor:
    selected = torch.sym_min(more[-3], coarse_k_BSX.shape[1])
    return q_BTJE.new_empty(*q_BTJE.shape[:2], selected, dtype=torch.int32)


@opaque(_fake_two_level)
def _select_in_two_levels(
    coarse_q_BTMN: Tensor,
    coarse_k_BSX: Tensor,
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
    check_index_inputs(q_BTJE, k_BSIE, w_BTJ, b_BTJ, start_BT=start_BT, stop_BT=stop_BT)
    check_coarse(coarse_q_BTMN, coarse_k_BSX, coarse_b_BTM, q_BTJE, k_BSIE)
    backend = implementation("two_level_topk", q_BTJE.device, q_BTJE.dtype)
    with outside_autocast(q_BTJE.device):
        inputs = (q_BTJE, k_BSIE, w_BTJ, b_BTJ, start_BT, stop_BT)
        coarse = (coarse_q_BTMN.to(q_BTJE.dtype), coarse_k_BSX, coarse_b_BTM.to(q_BTJE.dtype))
        return backend.run(*coarse, *inputs, topk, n_candidates, all_up_to)


def check_coarse(
    coarse_q_BTMN: Tensor, coarse_k_BSX: Tensor, coarse_b_BTM: Tensor, q_BTJE: Tensor, k_BSIE: Tensor
) -> None:
    """Raise ConfigError unless the coarse level's packed keys fit its queries, and both the indexer's."""
    check_axes(coarse_q_BTMN=coarse_q_BTMN, coarse_b_BTM=coarse_b_BTM, q_BTJE=q_BTJE)
    check_axes(coarse_k_BSX=coarse_k_BSX, k_BSIE=k_BSIE)
    check_axes(coarse_q_BTMN=coarse_q_BTMN, coarse_k_BSN=coarse_k_BSX[..., :-SCALE_BYTES])
    check_same_device(q_BTJE=q_BTJE, coarse_q_BTMN=coarse_q_BTMN, coarse_k_BSX=coarse_k_BSX)
    check_floating(coarse_q_BTMN=coarse_q_BTMN, coarse_b_BTM=coarse_b_BTM)
