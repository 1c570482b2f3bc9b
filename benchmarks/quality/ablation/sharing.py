"""One index for several neighbouring layers, as in IndexCache (arXiv 2603.12201): the first one leads.

The leader's index queries and keys choose for all layers of its group. In training its target is the average
of the group's: KL is linear in the target, so the mean of the layers' losses, each taken with the leader's
scores, has the gradient of the loss against their averaged attention. `selection_loss` is averaged likewise.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from fulmen.modeling.selectors import IndexerSelector, SelectionInputs, Selector
from fulmen.training.warmup.losses import IndexerLossSelector


def leaders(layers: Sequence[int], size: int, apart: int) -> dict[int, int]:
    """The leader of each layer: the first `apart` layers lead themselves, then come groups of `size`."""
    rest = layers[apart:]
    groups = {layer: rest[place - place % size] for place, layer in enumerate(rest)}
    return {**{layer: layer for layer in layers[:apart]}, **groups}


def group_means(shares: Sequence[float], leader_of: Mapping[int, int]) -> list[float]:
    """Each layer's share of k as the mean of its group's; `shares` in the order of `leader_of`."""
    groups: dict[int, list[float]] = {}
    for share, leader in zip(shares, leader_of.values(), strict=True):
        groups.setdefault(leader, []).append(share)
    return [sum(groups[leader]) / len(groups[leader]) for leader in leader_of.values()]


class SharedSelector(Selector):
    """The keys with the largest of the leader's scores: chosen once for all layers of a group with one k.

    Layers of a group that keep different k get the best so many by the same scores; these are computed again,
    which a kernel need not do.
    """

    def __init__(self, leader_of: Mapping[int, int]) -> None:
        self.leader_of = leader_of
        self.chosen: dict[int, Tensor] = {}

    def select(self, inputs: SelectionInputs, topk: int) -> Tensor:
        if self.leader_of[inputs.layer_idx] == inputs.layer_idx:
            self.led, self.chosen = inputs, {}
        if topk not in self.chosen:
            self.chosen[topk] = IndexerSelector().select(self.led, topk)
        return self.chosen[topk]


@dataclass
class SharedLossSelector(IndexerLossSelector):
    """The warm-up's loss of every layer, each with its leader's index."""

    leader_of: Mapping[int, int] = field(default_factory=dict)

    def select(self, inputs: SelectionInputs, topk: int) -> None:
        """As `IndexerLossSelector.select`."""
        if self.leader_of[inputs.layer_idx] == inputs.layer_idx:
            self.led = inputs
        names = ("index_q_BTJE", "index_k_BSIE", "index_w_BTJ", "index_b_BTJ")
        super().select(replace(inputs, **{name: getattr(self.led, name) for name in names}), topk)
