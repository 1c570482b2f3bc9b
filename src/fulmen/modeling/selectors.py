"""Selection strategies: small objects that say which keys a query keeps, attached to a model for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fulmen.errors import ConfigError
from fulmen.ops.select_topk import index_topk


@dataclass(frozen=True)
class SelectionInputs:
    """All that one layer knows when it selects: T queries over S keys, cached ones included.

    Index tensors are as in `fulmen.ops.index_scores`; q, k, v are the attention's own, after RoPE.
    """

    index_q_BTJE: Tensor
    index_k_BSIE: Tensor
    index_w_BTJ: Tensor
    index_b_BTJ: Tensor
    q_BTHD: Tensor
    k_BSGD: Tensor
    v_BSGV: Tensor
    start_BT: Tensor
    stop_BT: Tensor
    scale: float
    layer_idx: int


class Selector:
    """Override `select`; override `is_needed` too if the strategy must see short texts or never be asked."""

    def is_needed(self, n_keys: int, topk: int) -> bool:
        """Whether to ask at all. If not, every visible key is attended to and no index query is computed."""
        return n_keys > topk

    def select(self, inputs: SelectionInputs, topk: int) -> Tensor | None:
        """Positions `topk_BTK` (integers below S, distinct, -1 for none); None: every visible key."""
        raise NotImplementedError


class IndexerSelector(Selector):
    """The product: the keys with the largest index scores."""

    def select(self, inputs: SelectionInputs, topk: int) -> Tensor:
        return index_topk(
            inputs.index_q_BTJE,
            inputs.index_k_BSIE,
            inputs.index_w_BTJ,
            inputs.index_b_BTJ,
            inputs.start_BT,
            inputs.stop_BT,
            topk,
        )


class DenseSelector(Selector):
    """The control: every visible key at any length, so that a converted model is its dense source."""

    def is_needed(self, n_keys: int, topk: int) -> bool:
        return False


def dsa_attentions(model: nn.Module) -> list[Any]:
    """The converted attention modules of a model, in layer order. Raises ConfigError if there are none."""
    found = [module for module in model.modules() if isinstance(getattr(module, "selector", None), Selector)]
    if not found:
        raise ConfigError(f"{type(model).__name__} has no DSA layer; convert it with fulmen first")
    return found


@contextmanager
def use_selector(model: nn.Module, selector: Selector) -> Iterator[None]:
    """Let `selector` choose the keys in all converted layers for the length of the `with` block."""
    attentions = dsa_attentions(model)
    before = [attention.selector for attention in attentions]
    try:
        for attention in attentions:
            attention.selector = selector
        yield
    finally:
        for attention, old in zip(attentions, before, strict=True):
            attention.selector = old
