"""The K best keys of every query: from given scores, or straight from the indexer's inputs."""

from typing import Any

import torch
from torch import Tensor

from fulmen.config import require_positive_int
from fulmen.ops.common.checks import (
    check_axes,
    check_floating,
    check_index_inputs,
    check_integer,
    check_same_device,
)
from fulmen.ops.common.opaque import opaque
from fulmen.ops.common.precision import cast_as_autocast, outside_autocast
from fulmen.ops.dispatch import implementation, implements_by_name
from fulmen.ops.topk.cpp import index_topk_cpp, select_topk_cpp
from fulmen.ops.topk.reference import index_topk_reference, select_topk_reference
from fulmen.ops.topk.torch_blocked import index_topk_blocked, select_topk_blocked

implements_by_name("select_topk", "triton", "fulmen.ops.topk.triton:select_topk_triton")
implements_by_name("index_topk", "triton", "fulmen.ops.topk.triton:index_topk_triton")


@torch.no_grad()
def select_topk(scores_BTS: Tensor, start_BT: Tensor, stop_BT: Tensor, topk: int) -> Tensor:
    """Positions of the `topk` largest scores inside each query's interval.

    A pure function of the row: the more recent key (larger s) wins a tie, -0.0 equals 0.0, NaN ranks below
    every number, -inf included. The same row gives the same set in every batch, shape and thread count.

    Args:
        scores_BTS: any floating dtype, compared as float32 (float64 as float64).
        start_BT, stop_BT: int32 or int64; query t sees the keys start <= s < stop, clipped to 0..S.
        topk: keys to keep, at least 1.

    Returns:
        topk_BTK, int32, K = min(topk, S): ascending positions, then -1 where fewer keys are visible.

    Raises:
        ConfigError: topk below 1; axes, dtypes or devices that do not fit together.
        BackendError: a pinned backend that cannot run here.
    """
    require_positive_int("topk", topk)
    return _select_from_scores(scores_BTS, start_BT, stop_BT, topk)


def _fake_selected(scores_BTS: Tensor, start_BT: Tensor, stop_BT: Tensor, topk: int) -> Tensor:
    selected = torch.sym_min(topk, scores_BTS.shape[-1])
    return scores_BTS.new_empty(*scores_BTS.shape[:2], selected, dtype=torch.int32)


@opaque(_fake_selected)
def _select_from_scores(scores_BTS: Tensor, start_BT: Tensor, stop_BT: Tensor, topk: int) -> Tensor:
    check_axes(scores_BTS=scores_BTS, start_BT=start_BT, stop_BT=stop_BT)
    check_floating(scores_BTS=scores_BTS)
    check_integer(start_BT=start_BT, stop_BT=stop_BT)
    check_same_device(scores_BTS=scores_BTS, start_BT=start_BT, stop_BT=stop_BT)
    backend = implementation("select_topk", scores_BTS.device, scores_BTS.dtype)
    return backend.run(scores_BTS, start_BT, stop_BT, topk)


@torch.no_grad()
def index_topk(
    q_BTJE: Tensor,
    k_BSIE: Tensor,
    w_BTJ: Tensor,
    b_BTJ: Tensor | None,
    start_BT: Tensor,
    stop_BT: Tensor,
    topk: int,
) -> Tensor:
    """`select_topk(index_scores(...), ...)` in blocks of queries; never more scores than those of a block.

    Args and Raises: as `index_scores` and `select_topk`.

    Returns:
        topk_BTK, int32, K = min(topk, S): ascending positions, then -1 where fewer keys are visible.
    """
    require_positive_int("topk", topk)
    q_BTJE, k_BSIE = cast_as_autocast(q_BTJE, k_BSIE)
    return _select_from_index(q_BTJE, k_BSIE, w_BTJ, b_BTJ, start_BT, stop_BT, topk)


def _fake_index_topk(q_BTJE: Tensor, k_BSIE: Tensor, *more: Any) -> Tensor:
    selected = torch.sym_min(more[-1], k_BSIE.shape[1])
    return q_BTJE.new_empty(*q_BTJE.shape[:2], selected, dtype=torch.int32)


@opaque(_fake_index_topk)
def _select_from_index(
    q_BTJE: Tensor,
    k_BSIE: Tensor,
    w_BTJ: Tensor,
    b_BTJ: Tensor | None,
    start_BT: Tensor,
    stop_BT: Tensor,
    topk: int,
) -> Tensor:
    check_index_inputs(q_BTJE, k_BSIE, w_BTJ, b_BTJ, start_BT=start_BT, stop_BT=stop_BT)
    backend = implementation("index_topk", q_BTJE.device, q_BTJE.dtype)
    with outside_autocast(q_BTJE.device):
        return backend.run(q_BTJE, k_BSIE, w_BTJ, b_BTJ, start_BT, stop_BT, topk)
