"""vLLM's matrix products on CPUs that have no instructions for 16 bits."""

from typing import Any

import vllm._custom_ops as vllm_ops
from vllm.platforms import current_platform

from fulmen.ops.half_products import has_half_products, hasten_half_products


def take_products_from_torch(dtype: Any) -> None:
    """Let a model that is about to be built be multiplied by torch, as `fulmen.ops.half_products` hastens it.

    vLLM hands products to oneDNN, which takes 16-bit ones one number at a time on a CPU without instructions
    for them: a prompt of 2,048 tokens takes SmolLM2 52 s so, and 9 s by torch (AMD EPYC with AVX2, one core).
    """
    if current_platform.is_cpu() and not has_half_products(dtype):
        hasten_half_products(dtype)
        vllm_ops._supports_onednn = False
