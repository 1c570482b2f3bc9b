"""The warm-up's loss, taken where attention happens: a selector that selects nothing but measures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fulmen.modeling.selectors import SelectionInputs, Selector
from fulmen.ops.losses.indexer import indexer_loss
from fulmen.ops.losses.selection import selection_loss
from fulmen.ops.topk import index_topk, select_topk
from fulmen.training.query_rows import (
    TEMPERATURE,
    at_rows,
    attention_recall,
    batch_mean_attention,
    sampled_rows,
)

# Share of the KL in the loss. Chosen on four layers of SmolLM2-135M: docs/log.md.
KL_WEIGHT = 0.02


@dataclass(frozen=True)
class LayerLoss:
    """One layer's part of a step.

    loss: carries the gradient. kl: the dense KL (DeepSeek-V3.2, equation 3), nats. changed: the relative
    squared change of the output, `selection_loss`. entropy: of the target, nats.
    captured, oracle: attention recall of the indexer's k keys and of the best k keys, on a few of the rows.
    """

    loss: Tensor
    kl: float
    changed: float
    entropy: float
    captured: float
    oracle: float


@dataclass
class IndexerLossSelector(Selector):
    """Collects the loss of every layer while the model runs dense.

    Two parts: the exact head-summed KL over all visible keys (DeepSeek-V3.2, arXiv 2512.02556, equation 3),
    and `selection_loss`, the change that a soft top-k makes in the layer's output. The KL alone spends its
    gradient on sinks and neighbours, which are kept anyway: it falls fourfold and the selection gets worse.

    Attributes:
        out_weights: per layer, the projection of all heads' outputs (`attention.output_weight()`).
        n_rows: query rows drawn per sequence and layer; all that see more than k keys if there are fewer.
        n_measured: how many of the rows are also measured for attention recall.
    """

    out_weights: Mapping[int, Tensor]
    n_rows: int
    n_measured: int
    layers: dict[int, LayerLoss] = field(default_factory=dict)

    def is_needed(self, n_keys: int, topk: int) -> bool:
        return True

    def select(self, inputs: SelectionInputs, topk: int) -> None:
        """Add this layer's loss to `layers`; the layer then attends densely."""
        rows = sampled_rows(inputs, topk, self.n_rows)
        some = at_rows(inputs, rows)
        index = (some.index_q_BTJE, some.index_k_BSIE, some.index_w_BTJ, some.index_b_BTJ)
        leaves = (_leaf(index[0]), _leaf(index[1]), _leaf(index[2]), _leaf(index[3]))
        own = (some.q_BTHD.detach(), some.k_BSGD.detach(), some.v_BSGV.detach())
        ends = (some.start_BT, some.stop_BT)
        changes: Any = {"softcap": some.softcap, "sinks_H": some.sinks_H}
        kl = indexer_loss(*leaves, *own[:2], *ends, some.scale, **changes)
        temperature = TEMPERATURE * float(some.index_w_BTJ.detach().abs().mean())
        out_weight = self.out_weights[inputs.layer_idx]
        cut: Any = (topk, some.scale, temperature)
        changes["out_gate_BTN"] = some.out_gate_BTN
        changed = selection_loss(*leaves, *own, out_weight, *ends, *cut, **changes)
        captured, oracle = self._recall(inputs, rows, topk)
        self.layers[inputs.layer_idx] = LayerLoss(
            with_gradient_in_hand(changed.mean() + KL_WEIGHT * kl.kl_BT.mean(), leaves, index),
            float(kl.kl_BT.detach().mean()),
            float(changed.detach().mean()),
            float(kl.target_entropy_BT.detach().mean()),
            captured,
            oracle,
        )

    @torch.no_grad()
    def _recall(self, inputs: SelectionInputs, rows: Tensor, topk: int) -> tuple[float, float]:
        some = at_rows(inputs, rows[:: max(1, len(rows) // self.n_measured)])
        ends = (some.start_BT, some.stop_BT)
        p_BTS = batch_mean_attention(some)
        index = (some.index_q_BTJE, some.index_k_BSIE, some.index_w_BTJ, some.index_b_BTJ)
        chosen_BTK = index_topk(*index, *ends, topk)
        return attention_recall(p_BTS, chosen_BTK), attention_recall(p_BTS, select_topk(p_BTS, *ends, topk))


def _leaf(x: Tensor | None) -> Any:
    return None if x is None else x.detach().requires_grad_(x.requires_grad)


def with_gradient_in_hand(
    loss: Tensor, leaves: Sequence[Tensor | None], inputs: Sequence[Tensor | None]
) -> Tensor:
    """The scalar `loss` of `leaves` as one of `inputs`, whose values they copy; its gradient is taken now.

    So a layer's queries, keys and values need not wait in memory for the backward pass of the step.
    """
    if not loss.requires_grad:
        return loss
    pairs = [(leaf, x) for leaf, x in zip(leaves, inputs, strict=True) if leaf is not None]
    pairs = [(leaf, x) for leaf, x in pairs if leaf.requires_grad]
    gradients = torch.autograd.grad(loss, [leaf for leaf, _ in pairs])
    return _GradientInHand.apply(loss.detach(), *gradients, *(x for _, x in pairs))


class _GradientInHand(torch.autograd.Function):
    """`apply(loss, *gradients, *inputs) -> loss`."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, *gradients_and_inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients_and_inputs[: len(gradients_and_inputs) // 2])
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.saved_tensors
        return (None, *(None for _ in gradients), *(dloss * gradient for gradient in gradients))
