"""The sparse stage: all weights under real sparse attention (DeepSeek-V3.2, arXiv 2512.02556, section 2.1).

Two losses that share no gradient. The backbone learns from the next-token loss and from the dense teacher;
the indexer, whose inputs are detached, from its own loss (`fulmen.training.sparse.losses`). Trainer does the
rest: `accelerate launch`, mixed precision, accumulation, checkpoints.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fulmen.modeling.families import dsa_of
from fulmen.modeling.selectors import DenseSelector, IndexerSelector, Selector, dsa_attentions
from fulmen.training.rows import NO_LABEL, next_tokens
from fulmen.training.sparse.distill import NextTokenLosses, TeacherTargets, next_token_losses, no_targets
from fulmen.training.sparse.losses import SparseLayerLoss, SparseLossSelector
from fulmen.training.sparse.schedule import TopkSchedule
from fulmen.training.sparse.settings import SparseSettings

# Of the backbone's loss, in a sequence that has answers to questions: they are few among its tokens.
ANSWER_SHARE = 0.5


@dataclass(frozen=True)
class StepLosses:
    """What one forward pass measured, for the log: floats in nats, layers as `SparseLayerLoss`."""

    lm: float
    kl: float
    indexer: float
    layers: dict[int, SparseLayerLoss]
    tokens: int


class SparseStage(nn.Module):
    """What Trainer trains: the model, its losses, and the selector that takes the indexer's.

    In training mode `forward` gives the loss of the stage, otherwise the sparse model's next-token loss.
    """

    def __init__(self, model: PreTrainedModel, settings: SparseSettings) -> None:
        super().__init__()
        self.model = model
        self.alpha = settings.alpha
        self.attentions = {attention.layer_idx: attention for attention in dsa_attentions(model)}
        self.schedule: TopkSchedule | None = None
        self.step = 0
        indices = sorted(self.attentions)
        self.taps = SparseLossSelector(
            self.attentions,
            self._topk_of,
            settings.indexer_loss,
            settings.n_rows,
            measured=(indices[0], indices[len(indices) // 2], indices[-1]),
        )
        self.last: StepLosses | None = None
        # Accelerate's FSDP policy looks here for the modules to shard.
        self._no_split_modules = model._no_split_modules

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        answers: Tensor | None = None,
        targets: Tensor | None = None,
        teacher_ids: Tensor | None = None,
        teacher_logp: Tensor | None = None,
        teacher_rest: Tensor | None = None,
        first: int = 0,
    ) -> dict[str, Tensor]:
        """Losses of a batch of sequences, each weighing the same: "loss", "lm" and "kl", scalars.

        Args:
            input_ids, position_ids: int64 [B, T]; a position that does not follow the last starts a document.
            answers: bool [B, T], where the next token answers a question; None: nowhere.
            targets: bool [B, T], where losses are taken, as many in each row; None: wherever a token follows.
            teacher_*: `TeacherTargets` of the targets with a B in front; None: no teacher.
            first: leave out the losses of positions before it.
        """
        self._attach(self._selector())
        self.taps.begin()
        hidden_BTC = self.model.base_model(input_ids=input_ids, position_ids=position_ids, use_cache=False)[0]
        labels_BT = next_tokens(input_ids, position_ids)
        labels_BT[:, :first] = NO_LABEL
        if targets is not None:
            labels_BT = labels_BT.where(targets, NO_LABEL)
        given = None if teacher_ids is None else (teacher_ids, teacher_logp, teacher_rest)
        share_BT = label_shares(labels_BT != NO_LABEL, answers)
        backbone = self._backbone_losses(hidden_BTC, labels_BT, share_BT, given)
        loss, indexer = backbone.loss, torch.zeros(())
        if taken := list(self.taps.layers.values()):
            indexer = torch.stack([layer.loss for layer in taken]).mean()
            loss = loss + indexer.to(loss.device)
        self.last = StepLosses(
            float(backbone.lm),
            float(backbone.kl),
            float(indexer.detach()),
            self.taps.layers,
            labels_BT.numel(),
        )
        return {"loss": loss, "lm": backbone.lm, "kl": backbone.kl}

    def forget(self) -> None:
        """Drop the last forward pass's losses, which hold on to its graph."""
        self.taps.begin()
        self.last = None

    def _backbone_losses(
        self, hidden_BTC: Tensor, labels_BT: Tensor, share_BT: Tensor, given: Any
    ) -> NextTokenLosses:
        counts_BT = labels_BT != NO_LABEL
        labels_N, hidden_NC = labels_BT[counts_BT], hidden_BTC[counts_BT]
        if given is None:
            targets, alpha = no_targets(len(labels_N), labels_N.device), 0.0
        else:
            targets, alpha = TeacherTargets(*(part.flatten(0, 1) for part in given)), self.alpha
        weight_VC = self.model.get_output_embeddings().weight
        return next_token_losses(hidden_NC, weight_VC, labels_N, share_BT[counts_BT], targets, alpha)

    def _selector(self) -> Selector:
        dense = self.schedule is not None and self.schedule.kind == "dense"
        if dense:
            return DenseSelector()
        return self.taps if self.training else IndexerSelector()

    def _attach(self, selector: Selector) -> None:
        """Not for a `with` block: gradient checkpointing runs layers again after this forward has ended."""
        for attention in self.attentions.values():
            attention.selector = selector

    def _topk_of(self, layer: int) -> int:
        dsa = dsa_of(self.model.config)
        kept = dsa.topk if self.schedule is None else self.schedule.at(self.step, layer)
        return dsa.layer_topk(layer) if kept == dsa.topk else kept

    def trained_parameters(self) -> list[nn.Parameter]:
        """The weights that training changes, tied ones once."""
        return [*self.backbone_parameters(), *self.indexer_parameters()]

    def backbone_parameters(self) -> list[nn.Parameter]:
        """Trained weights outside the indexers."""
        return [p for name, p in self.named_parameters() if p.requires_grad and ".indexer." not in name]

    def indexer_parameters(self) -> list[nn.Parameter]:
        """Trained weights of the indexers."""
        return [p for name, p in self.named_parameters() if p.requires_grad and ".indexer." in name]

    def trained_state(self) -> dict[str, Tensor]:
        """The weights that training changes, tied ones once, contiguous on the CPU."""
        return {
            name: parameter.detach().contiguous().cpu()
            for name, parameter in self.named_parameters()
            if parameter.requires_grad
        }


def label_shares(counts_BT: Tensor, answers_BT: Tensor | None) -> Tensor:
    """What each token's loss counts, share_BT, of sum 1: rows alike; in one with answers, they count half."""
    parts = [counts_BT] if answers_BT is None else [counts_BT & answers_BT, counts_BT & ~answers_BT]
    weights = [1.0] if answers_BT is None else [ANSWER_SHARE, 1 - ANSWER_SHARE]
    share_BT = torch.zeros(counts_BT.shape, device=counts_BT.device)
    for weight, part_BT in zip(weights, parts, strict=True):
        share_BT += weight * part_BT / part_BT.sum(-1, keepdim=True).clamp(min=1)
    return share_BT / (share_BT.sum(-1, keepdim=True).clamp(min=1e-30) * len(counts_BT))
