"""vLLM's matrix products on CPUs that have no instructions for 16 bits."""

from functools import cache
from typing import Any, NamedTuple

import torch
import vllm._custom_ops as vllm_ops
from torch import Tensor
from torch.nn.functional import linear
from vllm.platforms import current_platform
from vllm.utils.torch_utils import direct_register_custom_op

from fulmen.memory import available_bytes
from fulmen.ops.half_products import few_rows, has_half_products, hasten_half_products, imitates_bfloat16


class TwoCopies(NamedTuple):
    """A layer's weights as oneDNN packs them, if there was room, and as they were, `[N, K]`."""

    packed: Any
    weight: Tensor


def take_products_from_torch(dtype: Any) -> None:
    """Let a model that is about to be built be multiplied by torch, as `fulmen.ops.half_products` hastens it.

    vLLM hands products to oneDNN, which takes 16-bit ones one number at a time on a CPU without instructions
    for them: a prompt of 2,048 tokens takes SmolLM2 52 s so, and 9 s by torch (AMD EPYC with AVX2, one core).
    With AVX-512 oneDNN imitates bfloat16: a prompt takes four times as long as by torch, and a token that is
    decoded two thirds, as its weights lie packed. There each takes what it is better at.
    """
    if not current_platform.is_cpu() or has_half_products(dtype):
        return
    hasten_half_products(dtype)
    if imitates_bfloat16(dtype):
        _share_products(few_rows(dtype))
    else:
        vllm_ops._supports_onednn = False


@cache
def _share_products(few: int) -> None:
    """Let oneDNN have products of up to `few` rows, and torch the others."""
    module: Any = vllm_ops
    pack = module.create_onednn_mm
    at_first = available_bytes()

    def create_both(weight_KN: Tensor, *sizes: Any) -> TwoCopies:
        # A second copy of the weights, until half of the memory is taken; caches come later.
        packed = pack(weight_KN, *sizes) if available_bytes() > at_first / 2 else None
        return TwoCopies(packed, weight_KN.t())

    def multiply(copies: TwoCopies, x: Tensor, bias: Tensor | None) -> Tensor:
        handle = x.new_empty(0) if copies.packed is None else copies.packed.handler_tensor
        found: Tensor = torch.ops.vllm.fulmen_product(x, copies.weight, bias, handle, few)
        return found

    module.create_onednn_mm, module.onednn_mm = create_both, multiply


def fulmen_product(x: Tensor, weight: Tensor, bias: Tensor | None, handle: Tensor, few: int) -> Tensor:
    """`x @ weight.T + bias`, of few rows by the packed weights of a handle, which may be empty.

    One operation to torch.compile: its graphs are for any number of rows.
    """
    if not handle.numel() or x.numel() > few * x.shape[-1]:
        return linear(x, weight, bias)
    out = x.new_empty(*x.shape[:-1], len(weight))
    torch.ops._C.onednn_mm(out, x.reshape(-1, x.shape[-1]), bias, handle)
    return out


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, handle: Tensor, few: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))


direct_register_custom_op("fulmen_product", fulmen_product, mutates_args=[], fake_impl=_fake)
