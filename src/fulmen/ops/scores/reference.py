"""Index scores, the specification."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fulmen.ops.common.index_keys import index_key_numbers
from fulmen.ops.common.intervals import interval_mask
from fulmen.ops.common.precision import math_dtype, nan_for_infinity
from fulmen.ops.dispatch import implements


class IndexScoresReference(NamedTuple):
    """Every intermediate of the index score."""

    visible_BTS: Tensor
    logits_BTJS: Tensor
    relu_BTJS: Tensor
    scores_BTS: Tensor


def index_scores_reference(
    q_BTJE: Tensor,
    k_BSIE: Tensor,
    w_BTJ: Tensor,
    b_BTJ: Tensor | None,
    start_BT: Tensor,
    stop_BT: Tensor,
) -> IndexScoresReference:
    """See `fulmen.ops.scores.index_scores`. Differentiable, by plain autograd."""
    dtype = math_dtype(q_BTJE.dtype)
    shared = q_BTJE.shape[2] // k_BSIE.shape[2]
    k_BSJE = index_key_numbers(k_BSIE, dtype).repeat_interleave(shared, dim=2)
    q_BTJE = nan_for_infinity(q_BTJE.to(dtype))
    logits_BTJS = torch.einsum("btje,bsje->btjs", q_BTJE, k_BSJE) * q_BTJE.shape[-1] ** -0.5
    if b_BTJ is not None:
        logits_BTJS = logits_BTJS + b_BTJ.to(dtype)[..., None]
    relu_BTJS = logits_BTJS.relu()
    scores_BTS = torch.einsum("btj,btjs->bts", w_BTJ.to(dtype), relu_BTJS)
    visible_BTS = interval_mask(start_BT, stop_BT, k_BSIE.shape[1])
    return IndexScoresReference(
        visible_BTS, logits_BTJS, relu_BTJS, scores_BTS.masked_fill(~visible_BTS, -torch.inf)
    )


@implements("index_scores", "reference")
def reference_scores(*inputs: Any) -> Tensor:
    """The result alone."""
    return index_scores_reference(*inputs).scores_BTS
