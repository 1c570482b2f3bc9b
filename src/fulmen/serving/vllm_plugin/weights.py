"""Weights may be replaced while an engine runs; what was made of them must not be kept.

vLLM loads a checkpoint anew, a trainer sends some weights by name, or they are written into the parameters.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod
from vllm.platforms import current_platform

from fulmen.modeling.gqa.indexer import GqaIndexer
from fulmen.ops.paged.project import Projections


class IndexerWeights:
    """An indexer's parameters as the kernels want them, without a copy: what is written there counts at once.

    The matrices of weights and shifts become parts of one, their biases of one float32 vector.
    """

    def __init__(self, indexer: GqaIndexer) -> None:
        both = (indexer.weights_proj, indexer.shift_proj)
        matrices: list[Tensor] = [part.weight for part in both]
        biases: list[Tensor] = [part.bias for part in both]
        coarse: tuple[Tensor, ...] = ()
        if indexer.coarse is not None:
            coarse = (indexer.coarse.wq, indexer.coarse.wk)
            matrices.append(indexer.coarse.w_shift)
            biases.append(indexer.coarse.b_shift)
        matrix_YC = _join(matrices, indexer.wq.weight.dtype)
        bias_Y = _join(biases, torch.float32)
        self.projections = Projections(indexer.wq.weight, indexer.wk.weight, matrix_YC, bias_Y, *coarse)
        # Not the parameters themselves: they may be replaced, too.
        parts = [held for part in indexer.modules() for held in (part._parameters, part._buffers)]
        slots = ((held, name) for held in parts for name in held)
        self._slots: list[tuple[dict[str, Any], str]] = [
            (held, name) for held, name in slots if held[name] is not None
        ]
        self._places = self._now()

    @property
    def hold(self) -> bool:
        """Whether the parameters still lie where they lay; else take a new object."""
        return self._now() == self._places

    def _now(self) -> list[int]:
        return [held[name].data_ptr() for held, name in self._slots]


def _join(parameters: list[Tensor], dtype: torch.dtype) -> Tensor:
    """One tensor of which each parameter becomes a part, with the numbers that it has."""
    joined = torch.cat([parameter.detach().to(dtype) for parameter in parameters])
    for parameter, part in zip(parameters, joined.split([len(one) for one in parameters]), strict=True):
        parameter.data = part
    return joined


class HeadWatch:
    """Has vLLM pack a language model's head again where its weights are others than those packed.

    On a CPU vLLM multiplies by a packed copy of the head. Its own reload makes that anew for a head that it
    loads, but not for one that is the embedding; whoever calls the model's `load_weights` or writes into its
    parameters gets no new copy at all.
    """

    def __init__(self) -> None:
        self._loads = 0
        self._packed: tuple[int, ...] | None = None

    def loaded(self) -> None:
        """Weights came by the model's `load_weights`, which writes past autograd's count of changes."""
        self._loads += 1

    def before_use(self, _module: Any, inputs: tuple[Any, ...]) -> None:
        """A hook of vLLM's logits processor, whose first input is the head."""
        head = inputs[0]
        if not _is_packed(head):
            return
        weight: Any = head.weight
        changes = 0 if weight.is_inference() else weight._version
        now = (self._loads, weight.data_ptr(), changes)
        if now != self._packed:
            head.quant_method.process_weights_after_loading(head)
            self._packed = now


def watch_head(model: Any) -> HeadWatch:
    """A watch over the head of a vLLM language model, if it is on this rank: the last of a pipeline."""
    watch = HeadWatch()
    if hasattr(model, "logits_processor"):
        model.logits_processor.register_forward_pre_hook(watch.before_use)
    return watch


def pack_head(model: Any) -> None:
    """The same at once, for vLLM's own models, which have no watch."""
    head: Any = getattr(model, "lm_head", None)
    if _is_packed(head):
        head.quant_method.process_weights_after_loading(head)


def _is_packed(head: Any) -> bool:
    method = getattr(head, "quant_method", None)
    return isinstance(head, ParallelLMHead) and isinstance(method, UnquantizedEmbeddingMethod)


def pack_experts_anew(model: nn.Module) -> None:
    """Have vLLM pack a model's experts whenever it has loaded them.

    On a CPU it does so only when it starts; later it puts plain matrices where its kernel reads packed ones.
    """
    if not current_platform.is_cpu():
        return
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if isinstance(method, UnquantizedFusedMoEMethod):
            # An attribute of the object goes before the method of its class.
            method.process_weights_after_loading = partial(_as_at_first, method)  # type: ignore[method-assign]


def _as_at_first(method: UnquantizedFusedMoEMethod, layer: Any) -> None:
    method.moe_kernel = None
    type(method).process_weights_after_loading(method, layer)
