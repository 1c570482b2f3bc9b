"""Which experts a running model chooses for every token, by vLLM's first model runner, the one for CPUs.

That runner does not return them; the second one, which needs Triton, does.
"""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.fused_moe.layer import MoERunner
from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter

from fulmen.errors import UnsupportedModelError


class RoutingRecord:
    """Of each request the experts of its tokens, in its layers with experts: [n_positions][n_layers][K].

    Valid where no token comes from the prefix cache. What is computed again counts as it is computed last.

    Raises UnsupportedModelError: a model whose routers cannot be asked.
    """

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self._step: dict[int, Tensor] = {}
        self._of_request: dict[str, list[tuple[Tensor, Tensor]]] = {}
        model = runner.get_model()
        for module in _expert_layers(model):
            if module._quant_method.is_monolithic or not isinstance(module.router, BaseRouter):
                raise UnsupportedModelError(
                    f"experts chosen by {type(module.router).__name__} cannot be recorded; train this model "
                    "on a machine with GPUs, or by generate"
                )
            module.router.set_capture_fn(partial(self._note, module.layer_id))
        model.register_forward_hook(self._store, with_kwargs=True)

    def take(self) -> dict[str, list[list[list[int]]]]:
        """The experts of all requests since the last call, by vLLM's name of each."""
        found = {name: _in_order(parts) for name, parts in self._of_request.items()}
        self._of_request = {}
        return found

    def _note(self, layer: int, chosen_TK: Tensor) -> None:
        self._step[layer] = chosen_TK.to("cpu", torch.int32, copy=True)

    def _store(self, _model: Any, _args: Any, named: dict[str, Any], _output: Any) -> None:
        """After a step: what its layers chose, to the requests whose tokens they were."""
        if not self._step:
            return
        chosen_TLK = torch.stack([self._step[layer] for layer in sorted(self._step)], 1)
        positions_T = named["positions"].cpu()
        names = self._runner.input_batch.req_ids
        starts = self._runner.query_start_loc.np[: len(names) + 1].tolist()
        for name, (start, stop) in zip(names, pairwise(starts), strict=True):
            part = (positions_T[start:stop].clone(), chosen_TLK[start:stop])
            self._of_request.setdefault(name, []).append(part)
        self._step = {}


def numbers_of_expert_layers(model: Any) -> list[int]:
    """Numbers of the layers that have experts, ascending."""
    return sorted(module.layer_id for module in _expert_layers(model))


def _expert_layers(model: Any) -> list[MoERunner]:
    return [module for module in model.modules() if isinstance(module, MoERunner)]


def _in_order(parts: Sequence[tuple[Tensor, Tensor]]) -> list[list[list[int]]]:
    positions_T, chosen_TLK = (torch.cat(both) for both in zip(*parts, strict=True))
    ordered_TLK = torch.empty_like(chosen_TLK[: int(positions_T.max()) + 1])
    ordered_TLK[positions_T] = chosen_TLK
    return ordered_TLK.tolist()
