"""Keep routing: experts that were chosen while a reply was sampled are chosen again in training.

DeepSeek-V3.2 (arXiv 2512.02556, section 3.1): engine and trainer round differently, and an update moves
routers; one that chooses other experts makes another function of the same weights.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from fulmen.errors import UnsupportedModelError
from fulmen.modeling.experts import experts_of

# How Transformers names routers that choose by one `topk` of their scores.
ROUTER = "TopKRouter"


class Routing:
    """The routers of a model, which choose by themselves unless they are told.

    What a router does with its choice stays its own: only the result of its `topk` is replaced.
    """

    def __init__(self, routers: list[nn.Module]) -> None:
        self._told_LNK: list[Tensor] | None = None
        self._noted: list[list[Tensor]] | None = None
        self._n_layers = len(routers)
        self._replaced, self._asked = 0, 0
        for layer, router in enumerate(routers):
            router.forward = _choosing(router.forward, partial(self._choose, layer))  # type: ignore[method-assign]

    def tell(self, experts_BSLK: Tensor | None) -> None:
        """Choose these from now on, -1 for an own choice; None: all choices are the routers' own.

        It lasts until the next call, since a backward pass may compute layers again.
        """
        told = None if experts_BSLK is None else experts_BSLK.long().flatten(0, 1).unbind(1)
        self._told_LNK = None if told is None else list(told)

    @contextmanager
    def noting(self, n_rows: int) -> Iterator[list[Tensor]]:
        """What is chosen inside for so many sequences: filled, at the end, with int64 [B, S, L, K]."""
        self._noted = [[] for _ in range(self._n_layers)]
        found: list[Tensor] = []
        try:
            yield found
            layers = [
                torch.cat([part.view(n_rows, -1, part.shape[-1]) for part in of], 1) for of in self._noted
            ]
            found.append(torch.stack(layers, 2))
        finally:
            self._noted = None

    def take_replaced(self) -> float:
        """The share of choices since the last call, in training, that would have been other experts."""
        share = self._replaced / max(self._asked, 1)
        self._replaced, self._asked = 0, 0
        return share

    def _choose(self, layer: int, scores_NE: Tensor, own: Any) -> Any:
        if self._noted is not None:
            self._noted[layer].append(own.indices.cpu())
        if self._told_LNK is None:
            return own
        told_NK = self._told_LNK[layer].to(own.indices.device)
        is_told_N1 = told_NK[:, :1] >= 0
        if torch.is_grad_enabled():
            differs_NK = own.indices.sort(-1).values != told_NK.sort(-1).values
            self._replaced += int((differs_NK & is_told_N1).any(-1).sum())
            self._asked += int(is_told_N1.sum())
        chosen_NK = torch.where(is_told_N1, told_NK, own.indices)
        return torch.return_types.topk((scores_NE.gather(-1, chosen_NK), chosen_NK))


_OF_MODEL: WeakKeyDictionary[PreTrainedModel, Routing] = WeakKeyDictionary()


def routing_of(model: PreTrainedModel) -> Routing | None:
    """A model's routing, the same one at each call; None for a model without experts.

    Raises UnsupportedModelError for experts that are chosen otherwise than by one `topk`.
    """
    if experts_of(model.config.get_text_config()) is None:
        return None
    if model not in _OF_MODEL:
        routers = [module for module in model.modules() if type(module).__name__.endswith(ROUTER)]
        if not routers:
            raise UnsupportedModelError(
                f"model_type {model.config.model_type!r}: its experts are not chosen by one topk of a "
                "router, so that training cannot choose those of sampling again; "
                "train one like Qwen3-MoE or Mixtral"
            )
        _OF_MODEL[model] = Routing(routers)
    return _OF_MODEL[model]


class _OneTopK(TorchFunctionMode):
    """Hands on the result of `topk` to who may replace it."""

    def __init__(self, choose: Callable[[Tensor, Any], Any]) -> None:
        super().__init__()
        self._choose = choose

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        return self._choose(args[0], found) if func in (torch.topk, Tensor.topk) else found


def _choosing(own: Callable[..., Any], choose: Callable[[Tensor, Any], Any]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        with _OneTopK(choose):
            return own(*args, **kwargs)

    return forward
