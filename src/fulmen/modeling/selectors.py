"""Selection strategies: small objects that say which keys a query keeps, attached to a model for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from fulmen.config import COARSE_FROM
from fulmen.errors import ConfigError
from fulmen.ops.topk import index_topk
from fulmen.ops.two_level import two_level_topk


class CoarseInputs(NamedTuple):
    """Coarse queries, packed keys and shifts (`fulmen.ops.two_level`); keys left to the indexer."""

    q_BTMN: Tensor
    k_BSX: Tensor
    b_BTM: Tensor
    n_candidates: int


@dataclass(frozen=True)
class SelectionInputs:
    """All that one layer knows when it selects: T queries over S keys, cached ones included.

    Index tensors are as in `fulmen.ops.scores`, keys packed unless they have a gradient; q, k, v are
    the attention's own, after RoPE. coarse: of an index in two levels. Scale, softcap and sinks are those of
    the attention's own softmax; out_gate is what its output is multiplied with, None for nothing.
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
    coarse: CoarseInputs | None = None
    softcap: float | None = None
    sinks_H: Tensor | None = None
    out_gate_BTN: Tensor | None = None

    @property
    def softmax(self) -> tuple[float, float | None, Tensor | None]:
        """Scale, softcap and sinks_H, as the operations on attention take them."""
        return self.scale, self.softcap, self.sinks_H


class Selector:
    """Override `select`; override `is_needed` too for a strategy that must see short sequences, or none.

    Override `attend` for one whose heads keep different keys.
    """

    def is_needed(self, n_keys: int, topk: int) -> bool:
        """Whether to ask at all. If not, every visible key is attended to and no index query is computed."""
        return n_keys > topk

    def select(self, inputs: SelectionInputs, topk: int) -> Tensor | None:
        """Positions `topk_BTK` (integers below S, distinct, -1 for none); None: every visible key."""
        raise NotImplementedError

    def attend(self, inputs: SelectionInputs, topk: int, dense_up_to: int) -> Tensor | None:
        """out_BTHV of heads that keep keys of their own, and all of at most `dense_up_to`; None: `select` is
        asked, for all heads alike. GQA layers ask."""
        return None


class IndexerSelector(Selector):
    """The product: the keys with the largest index scores, among those that a coarse level leaves."""

    def select(self, inputs: SelectionInputs, topk: int) -> Tensor:
        if inputs.coarse is None:
            return index_topk(*_index_inputs(inputs), topk)
        coarse, count = inputs.coarse, max(inputs.coarse.n_candidates, topk)
        return two_level_topk(*coarse[:3], *_index_inputs(inputs), topk, count, COARSE_FROM * count)


def asks_coarse(n_keys: int, n_candidates: int) -> bool:
    """Whether a query may see so many of `n_keys` that a coarse level is asked for its candidates.

    By the keys that there are; how many are seen may lie on a device. A compiler would make a case of each.
    """
    return torch.compiler.is_compiling() or n_keys > COARSE_FROM * n_candidates


class OneLevelSelector(Selector):
    """The same indexer without a coarse level: what that costs is the difference."""

    def select(self, inputs: SelectionInputs, topk: int) -> Tensor:
        return index_topk(*_index_inputs(inputs), topk)


def _index_inputs(inputs: SelectionInputs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    index = (inputs.index_q_BTJE, inputs.index_k_BSIE, inputs.index_w_BTJ, inputs.index_b_BTJ)
    return *index, inputs.start_BT, inputs.stop_BT


class DenseSelector(Selector):
    """The control: every visible key at any length, so that a converted model is its dense source."""

    def is_needed(self, n_keys: int, topk: int) -> bool:
        return False


def keep_short_pasts(topk_BTK: Tensor, start_BT: Tensor, stop_BT: Tensor, dense_up_to: int) -> Tensor:
    """A selection in which queries that see at most `dense_up_to` keys keep all of them.

    A layer may select fewer than the model's k; up to k the model is dense all the same, and whether a text
    comes at once, in chunks or token by token must not matter.
    """
    if topk_BTK.shape[-1] >= dense_up_to:
        return topk_BTK
    start_BT, visible_BT = start_BT.clamp(min=0), stop_BT - start_BT
    short_BT = (visible_BT > topk_BTK.shape[-1]) & (visible_BT <= dense_up_to)
    if torch.compiler.is_compiling():  # where nothing may go by what tensors hold
        width = dense_up_to
    elif not short_BT.any():
        return topk_BTK
    else:
        width = int(visible_BT[short_BT].max())
    past_BTK = start_BT[..., None] + torch.arange(width, device=start_BT.device)
    past_BTK = torch.where(past_BTK < stop_BT[..., None], past_BTK, -1).to(topk_BTK.dtype)
    padded_BTK = pad(topk_BTK, (0, width - topk_BTK.shape[-1]), value=-1)
    return torch.where(short_BT[..., None], past_BTK, padded_BTK)


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
