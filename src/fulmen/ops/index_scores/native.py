"""Index scores by the native kernel: the same bits for a query and a key whatever else is computed."""

from typing import NamedTuple

import torch
from torch import Tensor

from fulmen.ops.index_keys import SCALE_BYTES
from fulmen.ops.native_library import IndexShape, call_native, kernel_floats

# As `KeyKind` in `native/index_topk.cpp`.
FLOAT32, BFLOAT16, PACKED = range(3)


class KernelKeys(NamedTuple):
    """Index keys as a kernel takes them.

    Attributes:
        k: the tensor that holds them.
        n_keys, heads: sizes S and I.
        kind: what numbers it holds.
        strides: of B, S and I, in numbers.
        rows_BS: where key s of batch row b lies, int32; None: at s.
    """

    k: Tensor
    n_keys: int
    heads: int
    kind: int
    strides: tuple[int, int, int]
    rows_BS: Tensor | None = None


def plain_keys(k_BSIE: Tensor) -> KernelKeys:
    """Keys that lie one after the other."""
    k_BSIE = kernel_floats(k_BSIE)
    kind = BFLOAT16 if k_BSIE.dtype == torch.bfloat16 else FLOAT32
    stride_b, stride_s, stride_i, _ = k_BSIE.stride()
    return KernelKeys(k_BSIE, k_BSIE.shape[1], k_BSIE.shape[2], kind, (stride_b, stride_s, stride_i))


def paged_keys(packed_RX: Tensor, width: int, rows_BS: Tensor) -> KernelKeys:
    """Packed keys of width E in rows of a cache."""
    heads = packed_RX.shape[1] // (width + SCALE_BYTES)
    strides = (0, packed_RX.stride(0), width + SCALE_BYTES)
    return KernelKeys(packed_RX, rows_BS.shape[1], heads, PACKED, strides, rows_BS)


def index_scores_native(
    q_BTJE: Tensor,
    k_BSIE: Tensor,
    w_BTJ: Tensor,
    b_BTJ: Tensor | None,
    start_BT: Tensor,
    stop_BT: Tensor,
) -> Tensor:
    """See `fulmen.ops.index_scores.index_scores`."""
    scores_BTS = torch.full((*q_BTJE.shape[:2], k_BSIE.shape[1]), -torch.inf)
    inputs = (q_BTJE, plain_keys(k_BSIE), w_BTJ, b_BTJ, start_BT, stop_BT)
    call_index_kernel("fulmen_index_scores", *inputs, scores_BTS, 0)
    return scores_BTS


def call_index_kernel(
    function: str,
    q_BTJE: Tensor,
    keys: KernelKeys,
    w_BTJ: Tensor,
    b_BTJ: Tensor | None,
    start_BT: Tensor,
    stop_BT: Tensor,
    result: Tensor,
    topk: int,
    whole: int = 0,
) -> None:
    """Fill `result` by one of the kernels that take an indexer's inputs."""
    batch, queries, heads, width = q_BTJE.shape
    rows_BS = keys.rows_BS
    shape = IndexShape(
        *(batch, queries, keys.n_keys, heads, keys.heads, width, topk, whole, result.shape[-1]),
        *(keys.kind, *keys.strides, 0 if rows_BS is None else rows_BS.stride(0), torch.get_num_threads()),
    )
    q_BTJE = (q_BTJE.float() * width**-0.5).contiguous()
    shift_BTJ = None if b_BTJ is None else b_BTJ.float().contiguous()
    intervals = (x.long().contiguous() for x in (start_BT, stop_BT))
    queries_inputs = (w_BTJ.float().contiguous(), shift_BTJ, *intervals)
    call_native(function, q_BTJE, keys.k, rows_BS, *queries_inputs, result, shape)
