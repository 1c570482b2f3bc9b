"""What the warm-up trains: the indexers alone, while the backbone runs dense and without gradient."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fulmen.modeling.selectors import dsa_attentions, use_selector
from fulmen.training.warmup.losses import IndexerLossSelector, LayerLoss

MEASURED_ROWS = 8


class IndexerStack(nn.Module):
    """What Trainer trains: a model's indexers; the backbone stays out of `parameters` and `state_dict`."""

    def __init__(self, model: PreTrainedModel, n_rows: int) -> None:
        super().__init__()
        attentions = dsa_attentions(model)
        self.indexers = nn.ModuleDict(
            {str(attention.layer_idx): attention.indexer for attention in attentions}
        )
        self.n_rows = n_rows
        self.out_weights = {layer.layer_idx: layer.output_weight().detach() for layer in attentions}
        self.last: dict[int, LayerLoss] = {}
        self._backbone = (model,)  # in a tuple: not a submodule

    @property
    def model(self) -> PreTrainedModel:
        """The model, backbone included."""
        return self._backbone[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "IndexerStack":
        self.model._apply(fn)  # moves the indexers too: they are the model's own
        return self

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> dict[str, Tensor]:
        """Mean over layers of `IndexerLossSelector`'s loss, with gradient to the indexers alone."""
        taps = IndexerLossSelector(self.out_weights, self.n_rows, MEASURED_ROWS)
        with use_selector(self.model, taps):
            self.model.base_model(input_ids=input_ids, position_ids=position_ids, use_cache=False)
        self.last = taps.layers
        return {"loss": torch.stack([layer.loss for layer in taps.layers.values()]).mean()}
