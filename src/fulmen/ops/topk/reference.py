"""Selection, the specification: sort by (score, position), take the last K."""

import math

import torch
from torch import Tensor

from fulmen.ops.dispatch import implements
from fulmen.ops.scores.reference import index_scores_reference


@implements("select_topk", "reference")
def select_topk_reference(scores_BTS: Tensor, start_BT: Tensor, stop_BT: Tensor, topk: int) -> Tensor:
    """See `fulmen.ops.topk.select_topk`."""
    batch, queries, n_keys = scores_BTS.shape
    n_columns = min(topk, n_keys)
    rows = [
        _select_topk_reference_row(row_S, int(start), int(stop), n_columns)
        for row_S, start, stop in zip(
            scores_BTS.flatten(0, 1).tolist(), start_BT.flatten(), stop_BT.flatten(), strict=True
        )
    ]
    selected = torch.tensor(rows, dtype=torch.int32, device=scores_BTS.device)
    return selected.reshape(batch, queries, n_columns)


def _select_topk_reference_row(row_S: list[float], start: int, stop: int, n_columns: int) -> list[int]:
    visible = range(max(start, 0), min(stop, len(row_S)))
    # NaN ranks below every number; among equals (-0.0 == 0.0) the larger position wins.
    ranked = sorted(visible, key=lambda s: (not math.isnan(row_S[s]), _zero_if_nan(row_S[s]), s))
    chosen = sorted(ranked[max(len(ranked) - n_columns, 0) :])
    return chosen + [-1] * (n_columns - len(chosen))


def _zero_if_nan(score: float) -> float:
    return 0.0 if math.isnan(score) else score


@implements("index_topk", "reference")
def index_topk_reference(
    q_BTJE: Tensor,
    k_BSIE: Tensor,
    w_BTJ: Tensor,
    b_BTJ: Tensor | None,
    start_BT: Tensor,
    stop_BT: Tensor,
    topk: int,
) -> Tensor:
    """See `fulmen.ops.topk.index_topk`."""
    scores_BTS = index_scores_reference(q_BTJE, k_BSIE, w_BTJ, b_BTJ, start_BT, stop_BT).scores_BTS
    return select_topk_reference(scores_BTS, start_BT, stop_BT, topk)
