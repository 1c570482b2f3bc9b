"""Matrix products of 16-bit tensors on CPUs without instructions for them: in float32, a piece at a time.

Without AVX-512 torch takes bfloat16 products one number at a time: on an AMD EPYC with AVX2 at 10 GFLOP/s a
core in `linear`, and below 1 in `matmul`, where float32 has 87. With AVX-512, but without instructions for
bfloat16 (Intel's servers up to Ice Lake), it has 33 where float32 has 117 to 137. The same holds for float16
on most CPUs. Here torch's own kernels are put behind ones that widen what they read, which costs a tenth, and
round once.
"""

import platform
import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)
# Rows up to which torch's own kernels are as fast: reading the weights is most of the work. The second for
# bfloat16 where AVX-512 imitates it.
FEW_ROWS, FEW_ROWS_IMITATED = 3, 12
# Rows of the left side that are widened at once, and numbers of all that is: 64 MB of float32 or so.
ROWS_AT_ONCE, NUMBERS_AT_ONCE = 4096, 16 << 20
X86 = ("x86_64", "amd64")
OPERATORS = ("mm", "addmm", "bmm", "baddbmm")


def has_half_products(dtype: torch.dtype) -> bool:
    """Whether this machine's CPU multiplies matrices of a 16-bit dtype at speed; True for any other dtype."""
    if dtype not in HALF:
        return True
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and not imitates_bfloat16(dtype)


def imitates_bfloat16(dtype: torch.dtype) -> bool:
    """Whether a dtype is bfloat16, which oneDNN has by this CPU's AVX-512 for float32.

    It says that it has bfloat16 on all of AVX-512; that part of it came later.
    """
    if dtype != torch.bfloat16 or platform.machine().lower() not in X86:
        return False
    has_own = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return not has_own and torch.cpu._is_avx512_supported()


@cache
def few_rows(dtype: torch.dtype) -> int:
    """Rows on the left of a product up to which torch's own kernel of a 16-bit dtype is as fast."""
    return FEW_ROWS_IMITATED if imitates_bfloat16(dtype) else FEW_ROWS


def hasten_half_products(dtype: torch.dtype) -> None:
    """Let the process take products of this dtype in float32 from now on, if they are slow here.

    Nothing changes for other dtypes and devices, or where the CPU has the instructions.
    """
    if not has_half_products(dtype):
        _put_before_torch()


@cache
def _put_before_torch() -> torch.library.Library:
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        # That kernels are replaced is what is wanted.
        warnings.simplefilter("ignore")
        for name in OPERATORS:
            _replace(library, name)
    return library


def _replace(library: torch.library.Library, name: str) -> None:
    """Put `_in_pieces` before torch's CPU kernels of an operator, also the one that is given its output."""
    has_added = name in ("addmm", "baddbmm")
    own, own_out = (torch.library.get_kernel(f"aten::{name}{end}", "CPU") for end in ("", ".out"))

    def product(keys: Any, *tensors: Tensor, **scales: Any) -> Tensor:
        left, right = tensors[has_added:]
        if _stays(left, right, *tensors[:has_added]):
            found: Tensor = own.call_boxed(keys, *tensors, **scales)
            return found
        out = left.new_empty(*left.shape[:-1], right.shape[-1])
        return _in_pieces(keys, own, tensors, scales, out)

    def product_out(keys: Any, *tensors: Tensor, out: Tensor, **scales: Any) -> Tensor:
        left, right = tensors[has_added:]
        if _stays(left, right, out, *tensors[:has_added]) or out.shape != (*left.shape[:-1], right.shape[-1]):
            found: Tensor = own_out.call_boxed(keys, *tensors, out=out, **scales)
            return found
        return _in_pieces(keys, own, tensors, scales, out)

    library.impl(name, product, "CPU", with_keyset=True, allow_override=True)
    library.impl(f"{name}.out", product_out, "CPU", with_keyset=True, allow_override=True)


def _stays(left: Tensor, right: Tensor, *others: Tensor) -> bool:
    """Whether torch's own kernel takes a product: of another dtype, one that it refuses, or a few rows."""
    if left.dtype not in HALF or any(x.dtype != left.dtype for x in (right, *others)):
        return True
    if left.shape[-1] != right.shape[-2] or left.shape[:-2] != right.shape[:-2]:
        return True
    return left.ndim == 2 and len(left) <= few_rows(left.dtype)


def _in_pieces(
    keys: Any, kernel: Any, tensors: tuple[Tensor, ...], scales: dict[str, Any], out: Tensor
) -> Tensor:
    """A product (B,) N K x (B,) K M into `out`, by torch's kernel for float32; a tensor before is added."""
    *added, left, right = tensors
    added = [x.expand_as(out) for x in added]
    (n, k), m = left.shape[-2:], right.shape[-1]
    n_rows = min(n, ROWS_AT_ONCE)
    n_columns = min(m, max(1, NUMBERS_AT_ONCE // max(1, k, n_rows)))
    n_places = max(1, NUMBERS_AT_ONCE // max(1, n_rows * k + k * n_columns + n_rows * n_columns))
    for places in [()] if left.ndim == 2 else [(part,) for part in _spans(len(left), n_places)]:
        for rows in _spans(n, n_rows):
            wide_left = left[(*places, rows)].float()
            for columns in _spans(m, n_columns):
                piece = (*places, rows, columns)
                wide_right = right[(*places, slice(None), columns)].float()
                wide_added = [x[piece].float() for x in added]
                out[piece] = kernel.call_boxed(keys, *wide_added, wide_left, wide_right, **scales)
    return out


def _spans(count: int, size: int) -> list[slice]:
    """Slices of `size` things, at most, that are `count` together."""
    return [slice(begin, begin + size) for begin in range(0, count, max(1, size))]
