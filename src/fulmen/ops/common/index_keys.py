"""Index keys in 8 bits, as caches keep them: per token and index key head E numbers and one scale.

DeepSeek-V3.2 keeps its index keys in 8 bits too (fp8, blocks of 128). Here they are integers -127..127 times
a bfloat16 scale, so that a key is the same number wherever it is read: the product is exact in float32.
"""

import torch
from torch import Tensor

from fulmen.ops.common.opaque import opaque
from fulmen.ops.common.precision import math_dtype

INT8_MOST = 127
SCALE_BYTES = torch.bfloat16.itemsize


def pack_index_keys(k_BSIE: Tensor) -> Tensor:
    """int8 `[B, S, I, E + 2]`: the rounded numbers, then the two bytes of their scale.

    A key that is not finite gets a scale that is not: it comes back as NaN.
    """
    return _pack_numbers(k_BSIE.detach())


def _fake_packed(k_BSIE: Tensor) -> Tensor:
    return k_BSIE.new_empty(*k_BSIE.shape[:-1], k_BSIE.shape[-1] + SCALE_BYTES, dtype=torch.int8)


# A compiler that fuses this would leave out its rounding to bfloat16 and back.
@opaque(_fake_packed)
def _pack_numbers(k_BSIE: Tensor) -> Tensor:
    peak_BSI1 = k_BSIE.float().abs().amax(-1, keepdim=True)
    scale_BSI1 = _bfloat16_at_least(peak_BSI1 / INT8_MOST)
    divisor_BSI1 = scale_BSI1.float().masked_fill(scale_BSI1 == 0, 1)
    # NaN has no integer; its scale alone marks the key.
    codes_BSIE = (k_BSIE.float() / divisor_BSI1).nan_to_num(0, 0, 0).round_()
    return torch.cat(
        (codes_BSIE.clamp_(-INT8_MOST, INT8_MOST).to(torch.int8), scale_BSI1.view(torch.int8)), -1
    )


def unpack_index_keys(packed_BSIX: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """k_BSIE of `pack_index_keys`, in float32 or float64: exact."""
    codes_BSIE, scale_BSI1 = codes_and_scales(packed_BSIX)
    return codes_BSIE.to(dtype) * scale_BSI1.to(dtype)


def codes_and_scales(packed_BSIX: Tensor) -> tuple[Tensor, Tensor]:
    """The two parts of packed keys, of any axes before the last: int8 codes and their bfloat16 scale."""
    codes_BSIE, scale_bytes = packed_BSIX.split((packed_BSIX.shape[-1] - SCALE_BYTES, SCALE_BYTES), -1)
    # A copy always: those of one key alone are contiguous where they lie, maybe at an odd address.
    return codes_BSIE, scale_bytes.clone(memory_format=torch.contiguous_format).view(torch.bfloat16)


def index_key_numbers(k_BSIE: Tensor, dtype: torch.dtype) -> Tensor:
    """Index keys as an operation takes them, packed (int8) or not, as numbers of `dtype`."""
    return unpack_index_keys(k_BSIE, dtype) if is_packed(k_BSIE) else k_BSIE.to(dtype)


def is_packed(k_BSIE: Tensor) -> bool:
    """Whether index keys are rows of `pack_index_keys`."""
    return k_BSIE.dtype == torch.int8


def unpacked_index_inputs(q_BTJE: Tensor, k_BSIE: Tensor) -> tuple[Tensor, Tensor]:
    """For a kernel that takes no packed keys: queries and keys of one dtype, in which both are exact."""
    if not is_packed(k_BSIE):
        return q_BTJE, k_BSIE
    return q_BTJE.float(), unpack_index_keys(k_BSIE)


def round_index_keys(k_BSIE: Tensor) -> Tensor:
    """What a cache would give back, with the gradient of the keys as they are (straight-through)."""
    exact_BSIE = k_BSIE.to(math_dtype(k_BSIE.dtype))
    stored_BSIE = unpack_index_keys(pack_index_keys(k_BSIE), exact_BSIE.dtype)
    return stored_BSIE + (exact_BSIE - exact_BSIE.detach()) if exact_BSIE.requires_grad else stored_BSIE


def _bfloat16_at_least(x: Tensor) -> Tensor:
    """The least bfloat16 that is not below a positive float32."""
    rounded = x.bfloat16()
    return torch.where(rounded.float() < x, (rounded.view(torch.int16) + 1).view(torch.bfloat16), rounded)
