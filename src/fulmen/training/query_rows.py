"""Some query rows of a layer: drawn, cut out, and how much of their attention a selection recalls."""

from dataclasses import replace

import torch
from torch import Tensor

from fulmen.modeling.selectors import SelectionInputs
from fulmen.ops.attention.mean import mean_attention
from fulmen.ops.common.index_keys import index_key_numbers

# Width of the soft cut of `selection_loss`, in units of the mean head weight (a head's logit enters the score
# times that). Chosen on four layers of SmolLM2-135M: docs/log.md.
TEMPERATURE = 0.5


def at_rows(inputs: SelectionInputs, rows: Tensor) -> SelectionInputs:
    """The same layer with some of its queries; all keys stay."""
    own = ("q_BTHD", "out_gate_BTN", "start_BT", "stop_BT")
    by_query = ("index_q_BTJE", "index_w_BTJ", "index_b_BTJ", *own)
    taken = {name: value[:, rows] for name in by_query if (value := getattr(inputs, name)) is not None}
    # Where no gradient is wanted the keys come packed; a loss takes numbers.
    taken["index_k_BSIE"] = index_key_numbers(inputs.index_k_BSIE, inputs.index_q_BTJE.dtype)
    return replace(inputs, **taken)


def sampled_rows(inputs: SelectionInputs, topk: int, n_rows: int) -> Tensor:
    """Ascending positions of at most `n_rows` queries, drawn from those that see more than `topk` keys.

    From all if there are none. Uses torch's global generator, which Trainer's checkpoints restore.
    """
    seen_T = (inputs.stop_BT - inputs.start_BT).amin(0)
    rows = (seen_T > topk).nonzero()[:, 0]
    if len(rows) == 0:
        rows = torch.arange(len(seen_T), device=seen_T.device)
    drawn = torch.randperm(len(rows))[:n_rows].sort().values
    return rows[drawn.to(rows.device)]


def batch_mean_attention(some: SelectionInputs) -> Tensor:
    """p_BTS of a few query rows, the mean over heads."""
    rows = zip(some.q_BTHD, some.k_BSGD, some.start_BT, some.stop_BT, strict=True)
    return torch.stack([mean_attention(*row, *some.softmax) for row in rows])


def attention_recall(p_BTS: Tensor, topk_BTK: Tensor) -> float:
    """Attention recall: the share of p that the selected keys hold, mean over rows."""
    held_BTK = p_BTS.gather(-1, topk_BTK.clamp_min(0).long()).masked_fill(topk_BTK < 0, 0)
    return float(held_BTK.sum(-1).mean())
