"""The indexer's loss in the sparse stage: a selector that selects, and measures what it selected."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fulmen.modeling.selectors import IndexerSelector, SelectionInputs, Selector
from fulmen.ops.losses.indexer import indexer_loss_selected
from fulmen.ops.losses.selection import selection_loss
from fulmen.training.query_rows import (
    TEMPERATURE,
    at_rows,
    attention_recall,
    batch_mean_attention,
    sampled_rows,
)

INDEXER_LOSSES = ("kl", "output", "both")
# Share of the KL where both are taken; as in the warm-up (`fulmen.training.warmup.losses`).
KL_SHARE = 0.02
INDEXER = IndexerSelector()


@dataclass(frozen=True)
class SparseLayerLoss:
    """One layer's part of a step: `loss` with gradient to the indexer; the others are for the log.

    kl: over the selected set (DeepSeek-V3.2, equation 4), nats. changed: `selection_loss`. 0 if left out.
    captured: attention recall of the selection, over a few rows; None where it was not measured.
    """

    loss: Tensor
    kl: float
    changed: float
    captured: float | None


@dataclass
class SparseLossSelector(Selector):
    """Selects by the indexer and records its loss on sampled query rows.

    The KL over the selected set orders what is selected already; it has no gradient towards a key that was
    missed. `selection_loss` has. The rows are of queries that see more than `topk` keys; in a text without
    such a query the loss is 0, with a gradient of 0.

    The indexer always learns its target, `topk` keys, whatever the schedule lets the attention keep.

    Attributes:
        attentions: the converted layers, by index.
        topk_of: keys that a layer keeps at present, by index.
        kind: one of INDEXER_LOSSES.
        n_rows: query rows drawn per sequence and layer.
        measured: layers whose attention recall is measured, on `n_measured` of the rows.
        layers: the losses of this forward pass; cleared by `begin`.
    """

    attentions: dict[int, Any]
    topk_of: Callable[[int], int]
    kind: str
    n_rows: int
    measured: tuple[int, ...] = ()
    n_measured: int = 8
    layers: dict[int, SparseLayerLoss] = field(default_factory=dict)

    def begin(self) -> None:
        """Forget the last forward pass."""
        self.layers = {}

    def select(self, inputs: SelectionInputs, topk: int) -> Tensor | None:
        """The selection, None while the schedule keeps this layer dense; the loss goes to `layers`."""
        keeps = self.topk_of(inputs.layer_idx)
        topk_BTK = None if keeps >= inputs.k_BSGD.shape[1] else INDEXER.select(inputs, keeps)
        # Gradient checkpointing runs a layer again in the backward pass: the same operations must happen,
        # but the loss counts once.
        loss = self._loss(inputs, topk, topk_BTK if keeps == topk else None)
        self.layers.setdefault(inputs.layer_idx, loss)
        return topk_BTK

    def _loss(self, inputs: SelectionInputs, topk: int, topk_BTK: Tensor | None) -> SparseLayerLoss:
        rows = sampled_rows(inputs, topk, self.n_rows)
        some = at_rows(inputs, rows)
        chosen_BTK = INDEXER.select(some, topk) if topk_BTK is None else topk_BTK[:, rows]
        counts_BT = some.stop_BT - some.start_BT > topk
        parts = []
        if self.kind != "output":
            parts.append(_mean(self._kl(some, chosen_BTK), counts_BT))
        if self.kind != "kl":
            parts.append(_mean(self._changed(some, topk), counts_BT))
        loss = parts[0] if len(parts) == 1 else KL_SHARE * parts[0] + parts[1]
        return SparseLayerLoss(
            loss,
            float(parts[0].detach()) if self.kind != "output" else 0.0,
            float(parts[-1].detach()) if self.kind != "kl" else 0.0,
            self._captured(some, chosen_BTK),
        )

    def _kl(self, some: SelectionInputs, chosen_BTK: Tensor) -> Tensor:
        index = (some.index_q_BTJE, some.index_k_BSIE, some.index_w_BTJ, some.index_b_BTJ)
        own = (some.q_BTHD.detach(), some.k_BSGD.detach())
        arguments: Any = (*index, *own, chosen_BTK, *some.softmax)
        return indexer_loss_selected(*arguments).kl_BT

    def _changed(self, some: SelectionInputs, topk: int) -> Tensor:
        index = (some.index_q_BTJE, some.index_k_BSIE, some.index_w_BTJ, some.index_b_BTJ)
        own = (some.q_BTHD.detach(), some.k_BSGD.detach(), some.v_BSGV.detach())
        temperature = TEMPERATURE * float(some.index_w_BTJ.detach().abs().mean())
        # Anew at each step: the backbone is trained too.
        out_weight = self.attentions[some.layer_idx].output_weight().detach()
        ends = (some.start_BT, some.stop_BT)
        cut: Any = (topk, some.scale, temperature, *some.softmax[1:], some.out_gate_BTN)
        return selection_loss(*index, *own, out_weight, *ends, *cut)

    @torch.no_grad()
    def _captured(self, some: SelectionInputs, chosen_BTK: Tensor) -> float | None:
        if some.layer_idx not in self.measured or some.layer_idx in self.layers:
            return None
        rows = torch.arange(0, some.q_BTHD.shape[1], max(1, some.q_BTHD.shape[1] // self.n_measured))
        few_BTK = chosen_BTK[:, rows.to(chosen_BTK.device)]
        return attention_recall(batch_mean_attention(at_rows(some, rows)), few_BTK)


def _mean(loss_BT: Tensor, counts_BT: Tensor) -> Tensor:
    """Mean over the rows that count; 0 with a gradient of 0 if none does."""
    return torch.where(counts_BT, loss_BT, 0).sum() / counts_BT.sum().clamp(min=1)
