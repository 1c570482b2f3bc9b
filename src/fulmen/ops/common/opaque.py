"""Operations that torch.compile and torch.export take as one piece, whatever computes them.

Run eagerly, a function is called as it is: a registered operation costs 10 us and more a call, which a token
would pay for each layer. Only what is traced goes through the registered one.
"""

import re
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

Given = ParamSpec("Given")
Found = TypeVar("Found")

# A checkpoint's own copy of this source registers its own.
OP_NAMESPACE = re.sub(r"\W", "_", __name__)
# A gradient in q, k and v of (gradients of the outputs, q, k, v, other tensors, the outputs, scale, softcap).
AttentionGradients = Callable[..., tuple[Tensor, Tensor, Tensor]]


def opaque(fake: Callable[..., Any]) -> Callable[[Callable[Given, Found]], Callable[Given, Found]]:
    """Decorates a function without gradient, of tensors, numbers and None, annotated as such.

    `fake`: the results' shapes and dtypes from the same arguments: contiguous tensors of any values.
    """

    def decorate(eager: Callable[Given, Found]) -> Callable[Given, Found]:
        return _when_traced(_register(eager, fake), eager)

    return decorate


def opaque_attention(
    gradients: AttentionGradients,
) -> Callable[[Callable[Given, Found]], Callable[Given, Found]]:
    """Decorates a function `(q_BTHD, k_BSGD, v_BSGV, other tensors, scale, softcap) -> (out_BTHV, lse_BTH)`.

    `gradients`: as `AttentionGradients`, annotated; it may be opaque code too.
    """

    def decorate(eager: Callable[Given, Found]) -> Callable[Given, Found]:
        operation = _register(eager, _fake_attention)
        backward = _register(gradients, _fake_attention_gradients)

        def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
            *tensors, ctx.scale, ctx.softcap = inputs
            ctx.save_for_backward(*tensors, *output)

        def differentiate(ctx: Any, dout_BTHV: Tensor, dlse_BTH: Tensor) -> tuple[Tensor | None, ...]:
            found = backward(dout_BTHV, dlse_BTH, *ctx.saved_tensors, ctx.scale, ctx.softcap)
            return *found, *(None for _ in ctx.needs_input_grad[3:])

        operation.register_autograd(differentiate, setup_context=save)
        return _when_traced(operation, eager)

    return decorate


class SavedTensors:
    """In the place of an autograd function's context, to call its `backward` by hand."""

    def __init__(self, *saved_tensors: Tensor, **more: Any) -> None:
        self.saved_tensors = saved_tensors
        vars(self).update(more)


def _register(eager: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    @wraps(eager)
    def contiguous(*args: Any) -> Any:
        found = eager(*args)
        if isinstance(found, Tensor):
            return found.contiguous()
        return tuple(part.contiguous() for part in found)

    name = f"{OP_NAMESPACE}::{eager.__name__.lstrip('_')}"
    operation = torch.library.custom_op(name, contiguous, mutates_args=())
    operation.register_fake(fake)
    return operation


def _when_traced(operation: Any, eager: Callable[Given, Found]) -> Callable[Given, Found]:
    @wraps(eager)
    def call(*args: Given.args, **kwargs: Given.kwargs) -> Found:
        return operation(*args, **kwargs) if torch.compiler.is_compiling() else eager(*args, **kwargs)

    return call


def _fake_attention(q_BTHD: Tensor, k_BSGD: Tensor, v_BSGV: Tensor, *more: Any) -> tuple[Tensor, Tensor]:
    lse_dtype = torch.float64 if q_BTHD.dtype == torch.float64 else torch.float32
    shape = q_BTHD.shape[:3]
    return q_BTHD.new_empty(*shape, v_BSGV.shape[-1]), q_BTHD.new_empty(shape, dtype=lse_dtype)


def _fake_attention_gradients(
    dout_BTHV: Tensor, dlse_BTH: Tensor, q_BTHD: Tensor, k_BSGD: Tensor, v_BSGV: Tensor, *more: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q_BTHD.new_empty(q_BTHD.shape), k_BSGD.new_empty(k_BSGD.shape), v_BSGV.new_empty(v_BSGV.shape)
