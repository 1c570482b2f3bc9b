"""Training of bfloat16 weights: an update smaller than 1/256 of a weight would round away."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor

from fulmen.ops.half_products import HALF


def are_half(parameters: Iterable[Tensor]) -> bool:
    """Whether some are of 16 bits, so that training needs float32 copies and autocast."""
    return any(parameter.dtype in HALF for parameter in parameters)


@contextmanager
def in_float32(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Hold 16-bit parameters and buffers in float32, then round them to their own dtype; autocast computes.

    They stay the same objects, tied ones stay tied. Their gradients are gone at the end.
    """
    own = [(parameter, parameter.dtype) for parameter in parameters if parameter.dtype in HALF]
    for parameter, _ in own:
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for parameter, dtype in own:
            parameter.grad = None
            parameter.data = parameter.data.to(dtype)
