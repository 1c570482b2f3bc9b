"""The indexer's own loss beside the policy's, where it is trained: their gradients never meet."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fulmen.modeling.families import dsa_of
from fulmen.modeling.selectors import dsa_attentions
from fulmen.training.rl.settings import RlSettings
from fulmen.training.sparse.losses import SparseLossSelector


class IndexerLoss:
    """Takes the indexers' loss while the policy is scored; 0 where they are frozen.

    Attributes:
        loss: of the last forward pass, a scalar.
    """

    def __init__(self, model: PreTrainedModel, settings: RlSettings) -> None:
        self.loss: Tensor = torch.zeros(())
        self._attentions: dict[int, Any] = {}
        self._taps: SparseLossSelector | None = None
        if settings.indexer == "trained":
            dsa = dsa_of(model.config)
            self._attentions = {attention.layer_idx: attention for attention in dsa_attentions(model)}
            self._taps = SparseLossSelector(self._attentions, dsa.layer_topk, "both", settings.n_rows)
        self._own = {index: attention.selector for index, attention in self._attentions.items()}

    @contextmanager
    def taken(self) -> Iterator[None]:
        """A forward pass in the `with` block leaves its loss in `loss`.

        The layers keep looking through it until `rest`: checkpointing runs them again.
        """
        if self._taps is None:
            yield
            return
        self._taps.begin()
        for attention in self._attentions.values():
            attention.selector = self._taps
        yield
        if taken := list(self._taps.layers.values()):
            self.loss = torch.stack([layer.loss for layer in taken]).mean()

    def rest(self) -> None:
        """Give the layers their own selectors back, for passes that are not trained on."""
        self.loss = torch.zeros(())
        for index, attention in self._attentions.items():
            attention.selector = self._own[index]
