"""The lightning indexer's score of every visible key."""

from typing import Any

import torch
from torch import Tensor

from fulmen.ops.common.checks import check_index_inputs
from fulmen.ops.common.opaque import opaque
from fulmen.ops.common.precision import cast_as_autocast, math_dtype, outside_autocast
from fulmen.ops.dispatch import implementation, implements_by_name
from fulmen.ops.scores.cpp import index_scores_cpp
from fulmen.ops.scores.reference import index_scores_reference
from fulmen.ops.scores.torch_blocked import index_scores_blocked

implements_by_name("index_scores", "triton", "fulmen.ops.scores.triton:index_scores_triton")


@torch.no_grad()
def index_scores(
    q_BTJE: Tensor,
    k_BSIE: Tensor,
    w_BTJ: Tensor,
    b_BTJ: Tensor | None,
    start_BT: Tensor,
    stop_BT: Tensor,
) -> Tensor:
    """I[t, s] = sum_j w[t, j] * ReLU(q[t, j] . k[s, i(j)] * E^-0.5 + b[t, j]) with i(j) = j // (J // I).

    DeepSeek-V3.2 (arXiv 2512.02556, equation 1) is I = 1 and b = None. Without gradient: an indexer is
    trained through `indexer_loss`, which never holds the whole of these scores.

    Args:
        q_BTJE, k_BSIE: index queries and keys of one floating dtype; J a multiple of I. Or keys as a cache
            keeps them: int8 rows of `pack_index_keys`, of width E + 2, any strides but the last.
        w_BTJ, b_BTJ: weight and shift of each index head, any floating dtype; b may be None (no shift).
        start_BT, stop_BT: int32 or int64; query t sees the keys start <= s < stop, clipped to 0..S.

    Returns:
        scores_BTS in float32 (float64 for float64 inputs), -inf outside the interval.

    Raises:
        ConfigError: axes, heads, dtypes or devices that do not fit together.
        BackendError: a pinned backend that cannot run here.
    """
    q_BTJE, k_BSIE = cast_as_autocast(q_BTJE, k_BSIE)
    return _score_keys(q_BTJE, k_BSIE, w_BTJ, b_BTJ, start_BT, stop_BT)


def _fake_scores(q_BTJE: Tensor, k_BSIE: Tensor, *more: Any) -> Tensor:
    shape = (*q_BTJE.shape[:2], k_BSIE.shape[1])
    return q_BTJE.new_empty(shape, dtype=math_dtype(q_BTJE.dtype))


@opaque(_fake_scores)
def _score_keys(
    q_BTJE: Tensor,
    k_BSIE: Tensor,
    w_BTJ: Tensor,
    b_BTJ: Tensor | None,
    start_BT: Tensor,
    stop_BT: Tensor,
) -> Tensor:
    check_index_inputs(q_BTJE, k_BSIE, w_BTJ, b_BTJ, start_BT=start_BT, stop_BT=stop_BT)
    backend = implementation("index_scores", q_BTJE.device, q_BTJE.dtype)
    with outside_autocast(q_BTJE.device):
        return backend.run(q_BTJE, k_BSIE, w_BTJ, b_BTJ, start_BT, stop_BT)
